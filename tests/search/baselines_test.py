"""Tests of allocations without a search."""

import itertools

import numpy as np
import problems
import pytest

from dr_jax import search
from dr_jax.search import assignments


@pytest.mark.parametrize("position", range(4))
def test_uniform_takes_the_highest_bit_width_that_fits(position):
  problem = problems.problem(pinned={1: 2})
  cost = problem.cost(problem.start(position))
  result = problems.search(search.uniform, problem, cost)
  expected = [position, 2, *[position] * 4]
  assert list(problems.index_of(problem, result)) == expected
  assert result.evaluations == 1
  if position < 3:
    below = {**cost, "bops": cost["bops"] - 1}
    result = problems.search(search.uniform, problem, below)
    assert problems.index_of(problem, result)[0] == position + 1


def test_uniform_says_where_only_a_mixture_fits():
  latency = np.array([[5, 9], [9, 5]])
  problem = problems.problem(2, (8, 4), costs={"latency": latency})
  with pytest.raises(ValueError, match="no bit-width fits everywhere"):
    problems.search(search.uniform, problem, {"latency": 10})
  assert problem.evaluate.score.calls == []


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("names", [["stored_bits"], ["bops", "sum_bits"]])
def test_a_random_assignment_fills_the_budget(seed, names):
  problem = problems.problem(layers=9, ties=((0, 4), (2, 3)), pinned={8: 2})
  budgets = problems.budgets(problem, names=names)
  result = problems.search(search.random, problem, budgets, seed=seed)
  index = np.array(problems.index_of(problem, result))
  assert problem.fits(index, budgets)
  for group in problem.groups():
    raised = index.copy()
    raised[list(group)] -= 1
    assert raised[group[0]] < 0 or not problem.fits(raised, budgets)


def test_random_assignments_reach_every_one_that_fills_the_budget():
  problem = problems.problem(3)
  budgets = problems.budgets(problem, 0.5)
  drawn = problems.search(search.random, problem, budgets, draws=400)

  def full(index):
    raised = [np.subtract(index, row) for row in np.eye(3, dtype=int)]
    return problem.fits(index, budgets) and not any(
      r.min() >= 0 and problem.fits(r, budgets) for r in raised
    )

  every = {i for i in itertools.product(range(4), repeat=3) if full(i)}
  assert {trial.index for trial in drawn.trials} == every


def test_the_best_of_many_draws_is_taken_and_equal_ones_are_scored_once():
  problem = problems.problem(3)
  budgets = problems.budgets(problem, 0.5)
  result = problems.search(search.random, problem, budgets, draws=400)
  assert problems.index_of(problem, result) == problems.best(problem, budgets)
  assert result.evaluations < 64
  one = problems.search(search.random, problem, budgets)
  assert one.evaluations == 1
  assert one.trials[0].index == result.trials[0].index


def test_lowering_alone_reaches_the_smallest_budget(monkeypatch):
  def unneeded(*_):
    raise AssertionError("costs fall with the bits")

  monkeypatch.setattr(assignments, "nearest", unneeded)
  problem = problems.problem(pinned={2: 1})
  lowest = problem.start(3)
  result = problems.search(
    search.random, problem, problem.cost(lowest), draws=5
  )
  assert problems.index_of(problem, result) == tuple(lowest)


def test_draws_are_uniform_over_bit_widths():
  problem = problems.problem(4, ties=((0, 2),), pinned={3: 1})
  genes = assignments.Genes(problem, {"sum_bits": 32})
  rng = np.random.default_rng(0)
  drawn = np.array([genes.index(genes.draw(rng)) for _ in range(4000)])
  np.testing.assert_array_equal(drawn[:, 0], drawn[:, 2])
  np.testing.assert_array_equal(drawn[:, 3], 1)
  for layer in (0, 1):
    counts = np.bincount(drawn[:, layer], minlength=4)
    # Of 4000 with p = 1/4 the standard deviation is 27; 5 of them.
    np.testing.assert_allclose(counts, 1000, atol=137)


@pytest.mark.parametrize(
  ("draws", "message"),
  [
    (0, "draws must be an integer >= 1, got 0"),
    (1.5, "draws must be an integer >= 1, got 1.5"),
    (True, "draws must be an integer >= 1, got True"),
  ],
)
def test_a_wrong_number_of_draws_is_named(draws, message):
  problem = problems.problem()
  with pytest.raises(ValueError, match=message):
    problems.search(
      search.random, problem, problems.budgets(problem), draws=draws
    )
  assert problem.evaluate.score.calls == []


@pytest.mark.parametrize("cost", ["stored_bits", "sum_bits"])
def test_proportional_maximizes_the_sum_of_bits_over_parameters(cost):
  problem = problems.problem(5, ties=((0, 3),))
  budgets = problems.budgets(problem, 0.5, names=[cost])
  sizes = np.array([row.parameters for row in problem.table])
  bits = np.array(problem.bits)

  def value(index):
    return (bits[list(index)] / sizes).sum()

  result = problems.search(search.proportional, problem, budgets)
  index = problems.index_of(problem, result)
  fitting = filter(
    lambda i: problem.fits(i, budgets), problems.assignments(problem)
  )
  assert value(index) == pytest.approx(max(map(value, fitting)), rel=1e-12)
  assert result.evaluations == 1
  sizes[[0, 3]] = 2 / (1 / sizes[[0, 3]]).sum()  # tied: their harmonic mean
  if cost == "sum_bits":
    order = np.argsort(sizes, kind="stable")
    assert (np.diff(np.array(index)[order]) >= 0).all()


def test_genes_and_assignments_are_two_ways_to_say_the_same():
  problem = problems.problem(7, ties=((1, 3), (2, 5)), pinned={5: 0, 6: 2})
  budgets = problems.budgets(problem, 0.3, names=["stored_bits", "bops"])
  genes = assignments.Genes(problem, budgets)
  seen = set()
  for index in problems.assignments(problem):
    own = genes.of(index)
    assert genes.index(own) == index
    assert genes.fits(own) == problem.fits(index, budgets)
    seen.add(tuple(own))
  assert seen == set(itertools.product(range(4), repeat=3))


def test_budgets_of_any_size_are_kept():
  problem = problems.problem(3)
  result = problems.search(search.random, problem, {"bops": 2**70})
  assert problems.index_of(problem, result) == (0, 0, 0)


def test_the_nearest_assignment_is_the_fewest_positions_away():
  problem = problems.problem(4)
  budgets = problems.budgets(problem, 0.3)
  found = assignments.nearest(problem, budgets, (0, 1, 0, 2))
  assert problem.fits(found, budgets)

  def away(index):
    return np.abs(np.subtract(index, (0, 1, 0, 2))).sum()

  fitting = [
    i for i in problems.assignments(problem) if problem.fits(i, budgets)
  ]
  assert away(found) == min(map(away, fitting))
