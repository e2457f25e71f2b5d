"""Tests of genetic search."""

import math

import numpy as np
import problems
import pytest

from dr_jax import search
from dr_jax.search.genetic import genetic
from dr_jax.train import Score


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("predictor", [False, True])
def test_genetic_search_finds_the_best_where_damages_add_up(seed, predictor):
  problem = problems.problem(seed=seed, ties=((0, 5),))
  budgets = problems.budgets(problem, names=["stored_bits", "bops"])
  result = problems.search(
    search.genetic, problem, budgets, seed=seed, predictor=predictor, pool=4
  )
  assert problems.index_of(problem, result) == problems.best(problem, budgets)
  assert result.evaluations < 4**5 / 2


@pytest.mark.parametrize("fraction", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("predictor", [False, True])
def test_nothing_over_the_budget_is_ever_scored(fraction, predictor):
  problem = problems.problem(12, seed=1)
  budgets = problems.budgets(problem, fraction, names=["stored_bits", "bops"])
  problems.search(
    search.genetic, problem, budgets, generations=4, predictor=predictor
  )
  calls = problem.evaluate.score.calls
  assert len(calls) > 5
  assert all(problem.fits(index, budgets) for index in calls)


def test_a_predictor_spends_fewer_evaluations_for_as_good_a_result():
  for seed in range(3):
    problem = problems.problem(20, seed=seed)
    budgets = problems.budgets(problem)
    without = problems.search(
      search.genetic, problem, budgets, seed=seed, generations=6
    )
    predicted = problems.search(
      search.genetic,
      problem,
      budgets,
      seed=seed,
      generations=6,
      predictor=True,
      pool=4,
    )
    assert predicted.evaluations == 50 + 5 * 10
    assert predicted.evaluations < without.evaluations / 2
    assert predicted.loss <= without.loss


def test_without_a_predictor_every_child_is_scored():
  problem = problems.problem(20)
  budgets = problems.budgets(problem)
  result = problems.search(
    search.genetic,
    problem,
    budgets,
    population=7,
    generations=3,
    crossover=4,
    mutation=5,
  )
  # In 4^20 assignments a child is new within its ten tries.
  assert result.evaluations == 7 + 2 * (4 + 5)


def test_children_come_from_the_best_so_far():
  """With neither genes drawn anew nor a second parent nothing is new."""
  problem = problems.problem(20)
  budgets = problems.budgets(problem, 0.9)
  first = problems.search(
    search.genetic, problem, budgets, generations=1, population=30
  )
  best = sorted(first.trials, key=problem.rank)[:3]
  result = problems.search(
    search.genetic,
    problem,
    budgets,
    population=30,
    parents=3,
    generations=2,
    crossover=10,
    mutation=0,
  )
  children = [trial.index for trial in result.trials[30:]]
  assert len(children) == 10
  pairs = [(np.array(a.index), np.array(b.index)) for a in best for b in best]
  for child in children:
    assert any(((a == child) | (b == child)).all() for a, b in pairs)


def test_mutants_differ_from_a_parent_in_few_layers():
  problem = problems.problem(60)
  budgets = problems.budgets(problem, 0.9)
  result = problems.search(
    search.genetic,
    problem,
    budgets,
    population=30,
    parents=2,
    generations=2,
    crossover=0,
    mutation=200,
  )
  trials = result.trials
  best = sorted(trials[:30], key=problem.rank)[:2]
  parents = np.array([trial.index for trial in best])
  mutants = np.array([trial.index for trial in trials[30:]])
  away = (mutants[:, None] != parents).sum(-1).min(-1)
  # 60 layers, each drawn with 0.1, and then changed with 3/4: 4.5 on average;
  # of 200 its standard deviation is 0.15, and budgets favor small changes.
  assert 3.5 < away.mean() < 5


def test_each_generation_learns_from_the_one_before():
  problem = problems.problem(20)
  budgets = problems.budgets(problem)
  losses = [
    problems.search(search.genetic, problem, budgets, generations=n).loss
    for n in (1, 3, 9, 20)
  ]
  assert losses == sorted(losses, reverse=True)
  optimum = problem.solve(problem.evaluate.score.damage, budgets)
  best = problem.evaluate.score.damage[np.arange(20), optimum].sum()
  assert losses[-1] - best < (losses[0] - best) / 2
  assert (
    losses[-1]
    < problems.search(search.random, problem, budgets, draws=1000).loss
  )


def test_a_small_space_is_exhausted_and_no_child_is_scored_twice():
  problem = problems.problem(2)
  budgets = problem.cost((0, 0))
  result = problems.search(search.genetic, problem, budgets)
  calls = problem.evaluate.score.calls
  assert len(calls) == len(set(calls)) == result.evaluations <= 16
  assert problems.index_of(problem, result) == (0, 0)


@pytest.mark.parametrize("predictor", [False, True])
def test_genetic_search_continues_where_scores_are_not_finite(predictor):
  problem = problems.problem(
    score=lambda index: Score(10, math.nan if index[0] < 3 else index.sum())
  )
  budgets = problems.budgets(problem)
  options = {"predictor": predictor, "pool": 2}
  result = problems.search(search.genetic, problem, budgets, **options)
  assert problems.index_of(problem, result)[0] == 3
  blind = problems.problem(score=lambda index: Score(10, math.nan))
  with pytest.raises(
    ValueError, match="scores of the network must be finite, but the"
  ):
    problems.search(search.genetic, blind, budgets, **options, generations=3)


def test_the_predictor_ranks_by_the_metric():
  damage = problems.damage(8, problems.BITS)
  rows = np.arange(8)

  def score(index):
    """The loss says nothing; more accuracy is better."""
    return Score(accuracy=90 - 10 * damage[rows, index].sum(), loss=1.0)

  problem = problems.problem(8, score=score, metric="accuracy")
  budgets = problems.budgets(problem)
  result = problems.search(
    search.genetic, problem, budgets, predictor=True, generations=8
  )
  optimum = problem.solve(damage, budgets)
  assert problems.index_of(problem, result) == optimum


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"population": 0}, "population must be an integer >= "),
    ({"parents": 0}, "parents must be an integer >= 1, got 0"),
    ({"generations": 0}, "generations must be an integer >= 1, got 0"),
    ({"crossover": -1}, "crossover must be an integer >= 0, got -1"),
    ({"mutation": 2.5}, r"mutation must be an integer >= 0, got 2\.5"),
    ({"tries": 0}, "tries must be an integer >= 1, got 0"),
    ({"pool": 0}, "pool must be an integer >= 1, got 0"),
    ({"scored": 0}, "scored must be an integer >= 1, got 0"),
    ({"probability": 1.1}, "probability must be in 0..1, got 1.1"),
    ({"probability": math.nan}, r"probability must be in 0\.\.1, got nan"),
  ],
)
def test_wrong_options_are_named(options, message):
  problem = problems.problem()
  with pytest.raises(ValueError, match=message):
    problems.search(genetic, problem, problems.budgets(problem), **options)
  assert problem.evaluate.score.calls == []
