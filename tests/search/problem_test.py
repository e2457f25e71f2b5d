"""Tests of what searches are given: scores, budgets, ties, pins, results."""

import math
import signal

import numpy as np
import problems
import pytest

from dr_jax import allocate, search
from dr_jax.train import InterruptedRun, Score


def test_an_assignment_is_scored_once_and_remembered():
  asked = []

  def score(index):
    asked.append(index)
    return Score(accuracy=90.0, loss=0.5)

  evaluate = search.Evaluator(score)
  trial = evaluate(np.array([0, 3, 1]))
  assert evaluate((0, 3, 1)) is trial
  assert trial[:3] == ((0, 3, 1), 90.0, 0.5)
  assert trial.seconds >= 0
  assert len(asked) == 1
  assert asked[0].dtype == np.int32
  np.testing.assert_array_equal(asked[0], [0, 3, 1])


def test_another_evaluator_finds_the_scores_in_the_file(tmp_path):
  path = tmp_path / "deep" / "trials.jsonl"
  first = search.Evaluator(lambda index: Score(1 / 3, math.nan), path=path)
  trials = [first((0, 1)), first((2, 1))]

  def unasked(index):
    raise AssertionError(index)

  second = search.Evaluator(unasked, path=path)
  for trial in trials:
    found = second(trial.index)
    assert found.accuracy == trial.accuracy  # in the same bits
    assert math.isnan(found.loss)
    assert found.seconds == trial.seconds


def test_a_torn_last_line_is_cut_off_and_scored_again(tmp_path):
  path = tmp_path / "trials.jsonl"
  score = problems.Additive(problems.damage(2, problems.BITS))
  evaluate = search.Evaluator(score, path=path)
  evaluate((0, 0)), evaluate((1, 2))
  whole = path.read_bytes()
  path.write_bytes(whole[:-5])
  again = search.Evaluator(score, path=path)
  again((0, 0)), again((1, 2))
  assert score.calls == [(0, 0), (1, 2), (1, 2)]
  assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("line", ['"text"', "[1, 2]", "[3, 1, 1, 1]", "{"])
def test_a_file_that_is_not_of_trials_raises_an_error_that_names_it(
  tmp_path, line
):
  path = tmp_path / "trials.jsonl"
  path.write_text(line + "\n")
  with pytest.raises(ValueError, match="trials.jsonl is damaged: line 1: "):
    search.Evaluator(lambda index: Score(1, 1), path=path)


def test_a_signal_stops_a_search_before_its_next_score():
  stopping = []
  problem = problems.problem(
    2, interrupted=lambda: "SIGTERM" if stopping else None
  )
  log = search.SearchLog(problem, problems.budgets(problem), problem.evaluate)
  log((0, 0))
  stopping.append(True)
  with pytest.raises(
    InterruptedRun, match="search: stopped by SIGTERM"
  ) as caught:
    log((1, 0))
  assert caught.value.signal == signal.SIGTERM
  assert problem.evaluate.score.calls == [(0, 0)]


@pytest.mark.parametrize("score", [Score(math.nan, 1.0), Score(1.0, math.inf)])
def test_scores_that_are_not_finite_raise_an_error_at_the_end(score):
  problem = problems.problem(2, score=lambda index: score)
  with pytest.raises(ValueError, match="scores of the network must be finite"):
    problems.search(search.uniform, problem, problems.budgets(problem))


def test_costs_add_up_as_integers_of_any_size():
  large = np.array([[2**61, 1], [2**61, 1], [2**61 + 1, 1]])
  problem = problems.problem(3, (8, 4), costs={"huge": large})
  assert problem.cost((0, 0, 0)) == {"huge": 3 * 2**61 + 1}
  assert problem.cost((1, 0, 1)) == {"huge": 2**61 + 2}
  assert problem.fits((1, 0, 1), {"huge": 2**61 + 2})
  assert not problem.fits((1, 0, 1), {"huge": 2**61 + 1})


def test_every_budget_has_to_hold():
  problem = problems.problem(2)
  cost = problem.cost((1, 1))
  assert problem.fits((1, 1), cost)
  for name in cost:
    assert not problem.fits((1, 1), {**cost, name: cost[name] - 1})


def test_groups_are_ties_and_single_layers_without_what_a_pin_fixes():
  problem = problems.problem(7, ties=((1, 3), (2, 5)), pinned={5: 0, 6: 2})
  assert problem.groups() == [(0,), (1, 3), (4,)]
  assert problem.start(3).tolist() == [3, 3, 0, 3, 3, 0, 2]
  assert problem.start(3).dtype == np.int32


@pytest.mark.parametrize("budgets", [{}, {"watts": 3}])
def test_an_unknown_budget_or_none_is_named_with_the_costs(budgets):
  problem = problems.problem()
  with pytest.raises(
    ValueError, match="budgets must be of the costs stored_bits, bops"
  ):
    problem.check(budgets)


def test_the_solver_keeps_ties_and_pins_and_takes_more_pins():
  problem = problems.problem(ties=((0, 2),), pinned={4: 1})
  objective = problem.evaluate.score.damage
  budgets = problems.budgets(problem)
  index = problem.solve(objective, budgets)
  assert index == problems.best(problem, budgets)
  assert index[0] == index[2] and index[4] == 1
  held = problem.solve(objective, budgets, pinned={2: 3})
  assert held[0] == held[2] == 3 and held[4] == 1


def test_costs_of_another_shape_raise_an_error_that_names_them():
  with pytest.raises(ValueError, match=r"^costs\['x'\] must have .*\(6, 3\)"):
    problems.problem(costs={"x": np.ones((6, 3), np.int64)})


def test_the_metric_must_be_loss_or_accuracy():
  with pytest.raises(
    ValueError, match="metric must be loss or accuracy, got 'f1'"
  ):
    problems.problem(metric="f1")


def test_trials_are_ranked_by_the_metric_and_nan_comes_last():
  trials = [
    search.Trial((0,), accuracy, loss, 0.0)
    for accuracy, loss in ((90, 0.5), (91, 0.5), (95, 0.7), (95, math.nan))
  ]
  by_loss = sorted(trials, key=problems.problem(metric="loss").rank)
  assert [trials.index(t) for t in by_loss] == [1, 0, 2, 3]
  by_accuracy = sorted(trials, key=problems.problem(metric="accuracy").rank)
  assert [trials.index(t) for t in by_accuracy] == [2, 3, 1, 0]


def test_a_result_is_the_best_trial_within_the_budgets():
  problem = problems.problem(2)
  budgets = problem.cost((1, 1))
  log = search.SearchLog(problem, budgets, problem.evaluate)
  for index in ((0, 0), (3, 3), (1, 1), (2, 2), (1, 1)):
    log(index)
  result = log.result()
  damage = problem.evaluate.score.damage
  assert result.allocation == {"block0/conv": 6, "block1/conv": 6}
  assert isinstance(result.allocation, allocate.Allocation)
  assert result.loss == damage[0, 1] + damage[1, 1]
  assert result.accuracy == 100 * math.exp(-result.loss)
  assert result.cost == budgets
  assert result.evaluations == 4
  assert [t.index for t in result.trials] == [(0, 0), (3, 3), (1, 1), (2, 2)]
  assert result.evaluation_seconds == sum(t.seconds for t in result.trials)


def test_a_result_can_be_named_but_not_above_a_budget():
  problem = problems.problem(2)
  log = search.SearchLog(problem, problem.cost((1, 1)), problem.evaluate)
  log((1, 1))
  assert problems.index_of(problem, log.result((3, 2))) == (3, 2)
  with pytest.raises(ValueError, match="found .* which exceeds"):
    log.result((0, 1))


def test_remembered_scores_count_as_evaluations_of_each_search(tmp_path):
  problem = problems.problem(2, path=tmp_path / "trials.jsonl")
  budgets = problem.cost((1, 1))
  for _ in range(2):
    log = search.SearchLog(problem, budgets, problem.evaluate)
    log((1, 1))
    assert log.result().evaluations == 1
  assert problem.evaluate.score.calls == [(1, 1)]


def test_all_strategies_are_listed_by_name():
  assert list(search.SEARCHES) == [
    *("hessian_ilp", "greedy", "genetic", "edmips", "dnas", "reinforce"),
    *("uniform", "random", "proportional"),
  ]
  for name, strategy in search.SEARCHES.items():
    assert strategy is getattr(search, name)
    assert strategy.__name__ == name


# Strategies that need scores alone, with options that keep them short.
STRATEGIES = {
  "hessian_ilp": {},
  "greedy": {},
  "genetic": {"population": 8, "generations": 4},
  "uniform": {},
  "random": {"draws": 12},
  "proportional": {},
}


def run(name, problem, budgets, **options):
  options = {**STRATEGIES[name], **options}
  return problems.search(search.SEARCHES[name], problem, budgets, **options)


def with_tables(**fields):
  """A problem whose "error" is its damage."""
  layers = fields.get("layers", 6)
  damage = problems.damage(layers, problems.BITS, fields.get("seed", 0))
  return problems.problem(sensitivity={"error": damage}, **fields)


every_strategy = pytest.mark.parametrize("name", STRATEGIES)


@every_strategy
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0, 0.03, 0.3, 0.9, 1])
def test_budgets_ties_and_pins_hold(name, seed, fraction):
  problem = with_tables(seed=seed, ties=((0, 3), (2, 5)), pinned={4: 1, 2: 2})
  low, high = problem.cost(problem.start(3)), problem.cost(problem.start(0))
  budgets = {
    n: low[n] + int(fraction * (high[n] - low[n]))
    for n in ("stored_bits", "sum_bits")
  }
  result = run(name, problem, budgets, seed=seed)
  index = problems.index_of(problem, result)
  assert problem.fits(index, budgets)
  assert index[0] == index[3]
  assert index[4] == 1 and index[2] == index[5] == 2
  for trial in result.trials:
    assert trial.index[0] == trial.index[3]
    assert trial.index[4] == 1
    assert trial.index[2] == trial.index[5] == 2
  if fraction == 1 and name != "random":
    assert index == (0, 0, 2, 0, 1, 2)


@every_strategy
def test_a_search_reports_the_evaluations_that_it_made(name):
  problem = with_tables()
  result = run(name, problem, problems.budgets(problem))
  calls = problem.evaluate.score.calls
  assert [trial.index for trial in result.trials] == calls
  assert result.evaluations == len(calls) == len(set(calls))


@every_strategy
@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_result_is_the_best_trial_by_the_metric_within_the_budgets(
  name, metric
):
  damage = problems.damage(6, problems.BITS)
  rows = np.arange(6)

  def score(index):
    """Prefers different assignments by loss and by accuracy."""
    loss = damage[rows, index].sum()
    return Score(accuracy=50 + 10 * math.sin(50 * loss), loss=loss)

  problem = with_tables(score=score, metric=metric)
  budgets = problems.budgets(problem)
  result = run(name, problem, budgets)
  fitting = [t for t in result.trials if problem.fits(t.index, budgets)]
  scores = [getattr(t, metric) for t in fitting]
  best = min(scores) if metric == "loss" else max(scores)
  assert getattr(result, metric) == best


@every_strategy
def test_the_same_seed_finds_the_same(name):
  results = []
  for _ in range(2):
    problem = with_tables()
    results.append(run(name, problem, problems.budgets(problem), seed=3))
  first, second = results
  assert first.allocation == second.allocation
  assert [t[:3] for t in first.trials] == [t[:3] for t in second.trials]


@every_strategy
def test_another_seed_differs_where_the_search_is_random(name):
  problem = with_tables()
  budgets = problems.budgets(problem)
  one, other = (
    [t.index for t in run(name, problem, budgets, seed=seed).trials]
    for seed in (0, 1)
  )
  assert (one != other) == (name in ("genetic", "random"))


@pytest.mark.parametrize("name", ["hessian_ilp", "greedy", "genetic", "random"])
def test_a_killed_search_repeats_no_evaluation(tmp_path, name):
  whole = with_tables()
  budgets = problems.budgets(whole)
  expected = run(name, whole, budgets, seed=5)
  damage, path = whole.evaluate.score.damage, tmp_path / "trials.jsonl"

  killed = with_tables(path=path, score=problems.Additive(damage, limit=7))
  with pytest.raises(problems.Stop):
    run(name, killed, budgets, seed=5)
  again = with_tables(path=path)
  result = run(name, again, budgets, seed=5)
  assert result.allocation == expected.allocation
  assert [t[:3] for t in result.trials] == [t[:3] for t in expected.trials]
  assert result.evaluations == expected.evaluations
  asked = killed.evaluate.score.calls + again.evaluate.score.calls
  assert asked == whole.evaluate.score.calls


@every_strategy
def test_an_infeasible_budget_raises_before_any_evaluation(name):
  problem = with_tables()
  smallest = problem.cost(problem.start(3))["stored_bits"]
  with pytest.raises(allocate.Infeasible, match=f">= {smallest}"):
    run(name, problem, {"stored_bits": smallest - 1})
  assert problem.evaluate.score.calls == []
  assert run(name, problem, {"stored_bits": smallest}).cost["sum_bits"] == 12


@every_strategy
def test_with_all_layers_pinned_the_only_assignment_is_returned(name):
  pinned = {0: 1, 1: 3, 2: 0}
  problem = with_tables(layers=3, pinned=pinned)
  result = run(name, problem, problem.cost((1, 3, 0)))
  assert problems.index_of(problem, result) == (1, 3, 0)
  assert result.evaluations == 1


# What a chip may do that has 8-bit units only: 4 and 2 bits take longer.
SLOW = np.tile(np.array([10, 8, 13, 12]), (6, 1))


@pytest.mark.parametrize(
  "name", ["hessian_ilp", "greedy", "genetic", "random", "proportional"]
)
def test_budgets_hold_where_fewer_bits_cost_more(name):
  problem = with_tables(costs={"latency": SLOW})
  result = run(name, problem, {"latency": 49})
  assert result.cost["latency"] <= 49


def test_bits_that_are_not_highest_first_raise_an_error():
  with pytest.raises(
    ValueError, match=r"bits must be highest first, got \(2, 4\)"
  ):
    search.Problem(table=problems.problem(2).table, bits=(2, 4), costs={})
