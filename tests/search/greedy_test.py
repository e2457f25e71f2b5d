"""Tests of greedy search."""

import math

import numpy as np
import problems
import pytest

from dr_jax import search
from dr_jax.train import Score


def small(damage, costs, **fields):
  """A problem of a few layers with given damages and one cost."""
  damage = np.array(damage, float)
  layers, width = damage.shape
  return problems.problem(
    layers,
    (8, 4, 2)[:width],
    score=fields.pop("score", problems.Additive(damage)),
    costs={"size": np.array(costs)},
    **fields,
  )


def indices(result):
  return [trial.index for trial in result.trials]


def test_each_step_lowers_the_layer_that_costs_the_least_loss():
  problem = small(
    [[0, 3, 9], [0, 1, 5], [0, 2, 2.5]],
    [[8, 4, 2], [8, 4, 2], [8, 4, 2]],
  )
  result = problems.search(search.greedy, problem, {"size": 14})
  assert indices(result) == [
    (0, 0, 0),  # 24
    *((1, 0, 0), (0, 1, 0), (0, 0, 1)),  # 20: layer 1, with 1
    *((1, 1, 0), (0, 2, 0), (0, 1, 1)),  # 16: layer 2, with 1 + 2
    *((1, 1, 1), (0, 2, 1), (0, 1, 2)),  # 12 or 14: layer 2, with 1 + 2.5
  ]
  assert problems.index_of(problem, result) == (0, 1, 2)
  assert result.loss == 3.5
  assert result.evaluations == 10


def test_a_network_within_the_budget_keeps_its_bits():
  problem = problems.problem()
  budgets = problem.cost(problem.start(0))
  result = problems.search(search.greedy, problem, budgets)
  assert indices(result) == [(0,) * 6]


def test_an_earlier_trial_that_fits_and_is_better_is_returned():
  """Three cheap steps add up to more than the large one passed over."""
  problem = small(
    [[0, 5], [0, 2], [0, 2], [0, 2]], [[9, 1], [4, 2], [4, 2], [4, 2]]
  )
  result = problems.search(search.greedy, problem, {"size": 15})
  assert (0, 1, 1, 1) in indices(result)
  assert problems.index_of(problem, result) == (1, 0, 0, 0)


def test_loss_per_saved_cost_takes_the_large_step():
  problem = small(
    [[0, 5], [0, 2], [0, 2], [0, 2]], [[99, 1], [4, 2], [4, 2], [4, 2]]
  )
  result = problems.search(search.greedy, problem, {"size": 15}, per_cost=True)
  assert problems.index_of(problem, result) == (1, 0, 0, 0)
  assert indices(result) == [
    (0, 0, 0, 0),
    *((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
  ]


def test_loss_per_cost_is_relative_to_the_present_assignment():
  problem = small(
    [[0, 1, 5], [0, 2, 2.9], [0, 0, 0]],
    [[8, 4, 2], [8, 4, 2], [8, 8, 8]],
  )
  result = problems.search(search.greedy, problem, {"size": 14}, per_cost=True)
  # 1/4 first; then 2/4 in layer 1 against 4/2 in layer 0; then .9/2.
  # Lowering the last layer saves nothing.
  found = problems.index_of(problem, result)
  assert found == (1, 2, 0)
  assert result.evaluations == 10


def test_lowerings_that_improve_are_taken_by_their_loss():
  """By loss per cost, the smaller saving would look better."""
  problem = small([[3, 2, 2], [3, 1, 1]], [[9, 8, 7], [99, 9, 7]])
  result = problems.search(search.greedy, problem, {"size": 17}, per_cost=True)
  assert indices(result) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
  assert problems.index_of(problem, result) == (1, 1)


def test_the_nearest_assignment_that_fits_is_scored_where_lowering_misses_it():
  """The lowest bits take longest; layer 0 gets there first."""
  problem = small(
    [[0, 1, 2], [0, 9, 9.5], [0, 20, 21]], np.tile([10, 5, 12], (3, 1))
  )
  result = problems.search(search.greedy, problem, {"size": 15})
  assert problems.index_of(problem, result) == (1, 1, 1)
  assert (2, 2, 2) in indices(result)


@pytest.mark.parametrize("per_cost", [False, True])
def test_accuracy_decides_where_it_is_the_metric(per_cost):
  harm = np.array([[0.0, 9.0], [0.0, 1.0]])  # of accuracy; the loss disagrees

  def score(index):
    lost = harm[[0, 1], index].sum()
    return Score(accuracy=90 - lost, loss=5 + index[1])

  problem = small(harm, [[8, 4], [8, 4]], score=score, metric="accuracy")
  result = problems.search(
    search.greedy, problem, {"size": 12}, per_cost=per_cost
  )
  assert problems.index_of(problem, result) == (0, 1)


def test_ties_are_lowered_together():
  problem = small(
    [[0, 1], [0, 3], [0, 1]], [[8, 4], [8, 4], [8, 4]], ties=((0, 2),)
  )
  result = problems.search(search.greedy, problem, {"size": 20})
  assert indices(result) == [(0, 0, 0), (1, 0, 1), (0, 1, 0)]
  assert problems.index_of(problem, result) == (1, 0, 1)


@pytest.mark.parametrize("per_cost", [False, True])
def test_losses_that_are_not_finite_come_last(per_cost):
  def score(index):
    return Score(accuracy=10, loss=math.nan if index[0] else 1.0 + index[1])

  problem = small([[0, 0, 0], [0, 0, 0]], [[8, 4, 2], [8, 4, 2]], score=score)
  result = problems.search(
    search.greedy, problem, {"size": 10}, per_cost=per_cost
  )
  assert problems.index_of(problem, result) == (0, 2)
  with pytest.raises(
    ValueError, match="scores of the network must be finite, but the"
  ):
    problems.search(search.greedy, problem, {"size": 4}, per_cost=per_cost)


@pytest.mark.parametrize("seed", range(5))
def test_per_cost_comes_close_to_the_best_where_damages_add_up(seed):
  problem = problems.problem(seed=seed)
  budgets = problems.budgets(problem)
  rows = np.arange(6)
  best = problem.evaluate.score.damage[rows, problems.best(problem, budgets)]
  result = problems.search(search.greedy, problem, budgets, per_cost=True)
  floor = problems.search(search.uniform, problem, budgets)
  assert best.sum() <= result.loss < floor.loss
  # The last step overshoots: up to one layer's damage, here a quarter.
  assert result.loss <= 1.25 * best.sum()


def test_per_cost_needs_a_single_budget():
  problem = problems.problem()
  budgets = problems.budgets(problem, names=["bops", "sum_bits"])
  with pytest.raises(ValueError, match="budgets must be a single one .* got 2"):
    problems.search(search.greedy, problem, budgets, per_cost=True)
  assert problem.evaluate.score.calls == []
