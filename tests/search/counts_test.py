"""Tests of how much a search is said to compute, against what it does."""

import math

import numpy as np
import problems
import pytest

from dr_jax import search

SHORT = {
  "genetic": {"population": 8, "generations": 3, "crossover": 3, "mutation": 2},
  "reinforce": {"episodes": 4, "warmup": 2, "hidden": 4},
  "random": {"draws": 5},
}


def counted(name, problem, budgets, **options):
  return search.counts(search.SEARCHES[name], problem, budgets, options)


def evaluations(name, problem, budgets, **options):
  """Of the search itself."""
  strategy = search.SEARCHES[name]
  return problems.search(strategy, problem, budgets, **options).evaluations


def problem(layers=6, bits=problems.BITS, **fields):
  damage = problems.damage(layers, bits)
  return problems.problem(layers, bits, sensitivity={"error": damage}, **fields)


@pytest.mark.parametrize(
  "name",
  [
    *("greedy", "hessian_ilp", "genetic", "reinforce", "random"),
    *("uniform", "proportional"),
  ],
)
@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_no_search_scores_more_than_is_said(name, fraction):
  made = problem(ties=((0, 3),), pinned={1: 2})
  budgets = problems.budgets(made, fraction, names=["stored_bits", "bops"])
  options = SHORT.get(name, {})
  most = counted(name, made, budgets, **options).evaluations
  assert 1 <= evaluations(name, made, budgets, **options) <= most


def test_greedy_to_the_lowest_of_two_bit_widths_scores_what_is_said():
  made = problem(bits=(8, 2))
  budgets = made.cost(made.start(1))
  # 6 moves from the start, then 5, ..., then 1.
  assert counted("greedy", made, budgets).evaluations == 1 + 21
  assert evaluations("greedy", made, budgets) == 1 + 21


@pytest.mark.parametrize(("limit", "steps"), [(48, 0), (47, 1), (40, 4)])
def test_greedy_takes_as_many_steps_as_the_way_that_saves_least(limit, steps):
  made = problem()
  # Each of six layers has 8, 6, 4 or 2 bits: every step saves 2.
  budgets = {"sum_bits": limit}
  assert counted("greedy", made, budgets).evaluations == 1 + 6 * steps
  assert evaluations("greedy", made, budgets) == 1 + 6 * steps


def test_greedy_may_go_all_the_way_down_where_fewer_bits_cost_more():
  costs = {"latency": np.array([[8, 9, 2], [8, 4, 2]])}
  made = problem(2, (8, 4, 2), costs=costs)
  budgets = {"latency": 15}
  most = counted("greedy", made, budgets).evaluations
  # Both layers at three positions: there are no more assignments.
  assert most == 9
  assert evaluations("greedy", made, budgets) <= most


def test_hessian_ilp_scores_the_optimum_and_its_neighbors():
  made = problem()
  budgets = made.cost(made.start(0))
  # Every layer has three bit-widths below the optimum, which is the highest.
  assert counted("hessian_ilp", made, budgets).evaluations == 1 + 6 * 3
  assert evaluations("hessian_ilp", made, budgets) == 1 + 6 * 3
  few = counted("hessian_ilp", made, budgets, max_candidates=4)
  assert few.evaluations == 4
  assert evaluations("hessian_ilp", made, budgets, max_candidates=4) == 4


@pytest.mark.parametrize(
  ("options", "most"),
  [
    ({"generations": 6, "predictor": True, "pool": 4}, 50 + 5 * 10),
    ({"population": 3, "generations": 1}, 3),
  ],
)
def test_genetic_search_counts_its_children(options, most):
  made = problem(20)
  budgets = problems.budgets(made)
  assert counted("genetic", made, budgets).evaluations == 50 + 19 * 50
  assert counted("genetic", made, budgets, **options).evaluations == most
  assert evaluations("genetic", made, budgets, **options) == most


@pytest.mark.parametrize("name", ["genetic", "reinforce"])
def test_no_search_scores_an_assignment_twice(name):
  made = problem(1)
  assert counted(name, made, problems.budgets(made)).evaluations == 4


def test_reinforcement_scores_its_reference_too():
  made = problem()
  budgets = problems.budgets(made)
  assert counted("reinforce", made, budgets).evaluations == 601
  given = counted("reinforce", made, budgets, reference=50.0, episodes=7)
  assert given.evaluations == 7


@pytest.mark.parametrize("name", ["edmips", "dnas"])
def test_a_search_by_gradient_trains_and_scores_once(name):
  made = problem()
  budgets = problems.budgets(made)
  assert counted(name, made, budgets) == (1, 200)
  assert counted(name, made, budgets, steps=3) == (1, 3)
  pinned = problem(2, pinned={0: 0, 1: 0})
  assert counted(name, pinned, problems.budgets(made)) == (1, 0)


def test_a_strategy_of_which_nothing_is_known_scores_all_at_most():
  def strategy(problem, budgets, evaluate, *, seed=0):
    del problem, budgets, evaluate, seed

  made = problem(ties=((0, 3),))
  every = len(list(problems.assignments(made)))
  most = search.counts(strategy, made, {"sum_bits": 40}, {}).evaluations
  assert most == every == math.prod([4] * 5)
