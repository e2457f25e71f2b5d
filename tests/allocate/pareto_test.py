import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dr_jax import allocate


@st.composite
def problems(draw):
  layers, width = draw(st.integers(1, 4)), draw(st.integers(1, 3))
  size = layers * width
  # Quarters: their sums are exact in float64.
  losses = st.lists(st.integers(-6, 6), min_size=size, max_size=size)
  costs = st.lists(st.integers(0, 6), min_size=size, max_size=size)
  sensitivity = np.array(draw(losses)).reshape(layers, width) / 4
  tied = draw(st.permutations(range(layers)))[: draw(st.integers(0, layers))]
  pinned = {0: draw(st.integers(0, width - 1))} if draw(st.booleans()) else {}
  cost = np.array(draw(costs)).reshape(layers, width)
  return sensitivity, cost, [tied] if tied else [], pinned


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(problems())
def test_the_front_is_that_of_all_allocations(problem):
  sensitivity, cost, ties, pinned = problem
  layers, width = sensitivity.shape
  rows = np.arange(layers)
  points = set()
  for index in itertools.product(range(width), repeat=layers):
    if all(len({index[i] for i in group}) == 1 for group in ties) and all(
      index[i] == column for i, column in pinned.items()
    ):
      points.add((cost[rows, index].sum(), sensitivity[rows, index].sum()))
  expected = [
    (c, s)
    for c, s in sorted(points)
    if not any(o != (c, s) and o[0] <= c and o[1] <= s for o in points)
  ]
  front = allocate.pareto(sensitivity, cost, ties=ties, pinned=pinned)
  assert list(zip(front.cost, front.objective, strict=True)) == expected
  for total, objective, index in zip(*front, strict=True):
    assert cost[rows, index].sum() == total
    assert sensitivity[rows, index].sum() == objective
    assert all(len({index[i] for i in group}) == 1 for group in ties)
    assert all(index[i] == column for i, column in pinned.items())


@pytest.mark.parametrize("options", [{}, {"ties": [[0, 3]], "pinned": {1: 2}}])
def test_solve_agrees_at_every_point_and_between(options):
  rng = np.random.default_rng(0)
  sensitivity = 10 ** rng.uniform(-6, 5, (7, 1)) * rng.random((7, 4))
  cost = rng.integers(1, 10**6, (7, 1)) * np.array([8, 6, 4, 2])
  front = allocate.pareto(sensitivity, cost, **options)
  assert len(front.cost) >= 10
  for budget in [*front.cost, *(front.cost[1:] - 1)]:
    found = allocate.solve(
      sensitivity, {"cost": cost}, {"cost": int(budget)}, **options
    )
    point = front.at(int(budget))
    assert point.objective == found.objective
    assert point.usage == found.usage
    assert point.index.tolist() == found.index.tolist()
    assert point.index.dtype == found.index.dtype


def test_the_front_within_the_budget_has_the_golden_size(golden):
  checked = 0
  for instance in golden("ilp.json")["instances"]:
    if "pareto_front_size" not in instance:
      continue
    (constraint,) = instance["constraints"]
    front = allocate.pareto(instance["sensitivity"], constraint["cost"])
    within = front.cost <= constraint["budget"]
    assert within.sum() == instance["pareto_front_size"]
    if instance["feasible"]:
      point = front.at(constraint["budget"])
      assert point.objective == instance["optimal_objective"]
      assert list(point.usage.values()) == instance["usage"]
    checked += 1
  assert checked > 5


def test_sixty_layers_have_a_front_of_exact_sums():
  rng = np.random.default_rng(0)
  bits = np.array([8, 6, 4, 2])
  parameters = rng.choice([432, 2304, 4608, 9216, 36864], (60, 1))
  sensitivity = rng.lognormal(0, 2, (60, 1)) * 4.0**-bits
  front = allocate.pareto(sensitivity, parameters * bits)
  assert front.cost.dtype == np.int64
  assert front.index.shape == (len(front.cost), 60)
  assert (np.diff(front.cost) > 0).all()
  assert (np.diff(front.objective) < 0).all()
  rows = np.arange(60)
  for point in range(0, len(front.cost), 97):
    chosen = sensitivity[rows, front.index[point]]
    assert front.objective[point] == math.fsum(chosen)
    cost = (parameters * bits)[rows, front.index[point]].sum()
    assert front.cost[point] == cost


def test_sums_that_float64_cannot_tell_apart_are_one_point():
  front = allocate.pareto([[1.0, 1.0], [2.0**-70, 0.0]], [[1, 2], [1, 2]])
  assert front.cost.tolist() == [2]
  assert front.index.tolist() == [[0, 0]]


def test_a_budget_below_the_front_is_infeasible():
  front = allocate.pareto([[1.0, 2.0]] * 2, [[8, 3]] * 2)
  with pytest.raises(
    allocate.Infeasible, match="budget must be >= 6, the smallest cost, got 5"
  ) as e:
    front.at(5)
  assert e.value.smallest == 6
  assert front.at(6).usage == {"cost": 6}


@pytest.mark.parametrize(
  ("sensitivity", "cost", "message"),
  [
    ([[np.nan]], [[1]], r"sensitivity\[0, 0\] must be finite, got nan"),
    (
      [[1.0]],
      [[1.5]],
      r"costs\['cost'\]\[0, 0\] must be an integer >= 0, got 1\.5",
    ),
  ],
)
def test_wrong_arguments_are_named(sensitivity, cost, message):
  with pytest.raises(ValueError, match=message):
    allocate.pareto(sensitivity, cost)
