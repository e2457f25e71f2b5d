import fractions
import importlib
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dr_jax import allocate
from dr_jax.allocate import branch_and_bound

SCALES = (1e-6, 1e-4, 1e-2, 1.0, 1e5)


def brute_force(sensitivity, costs, budgets, equal=(), ties=(), pinned=None):
  """Returns the index with the least (sensitivity, costs, index), or None."""
  layers, width = sensitivity.shape
  rows = np.arange(layers)
  best = None
  for index in itertools.product(range(width), repeat=layers):
    if any(len({index[layer] for layer in group}) > 1 for group in ties):
      continue
    if any(index[layer] != column for layer, column in (pinned or {}).items()):
      continue
    use = {n: int(costs[n][rows, index].sum()) for n in budgets}
    if any(
      use[n] != b if n in equal else use[n] > b for n, b in budgets.items()
    ):
      continue
    total = sum(map(fractions.Fraction, sensitivity[rows, index].tolist()))
    rank = (total, *use.values(), *index)
    best = rank if best is None else min(best, rank)
  return None if best is None else list(best[-layers:])


def cases(entries):
  """Small problems; few different numbers, so that many answers tie."""

  @st.composite
  def draw_case(draw):
    layers, width = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    names = ["size", "bops", "time"][: draw(st.integers(0, 3))]

    def table(elements):
      flat = st.lists(
        elements, min_size=layers * width, max_size=layers * width
      )
      return np.array(draw(flat)).reshape(layers, width)

    costs = {n: table(st.integers(0, 6)) for n in names}
    budgets = {n: draw(st.integers(1, 4 * layers)) for n in names}
    equal = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    tied = draw(st.permutations(range(layers)))[: draw(st.integers(0, layers))]
    pinned = {}
    free = [layer for layer in range(layers) if layer not in tied]
    if free and draw(st.booleans()):
      pinned[draw(st.sampled_from(free))] = draw(st.integers(0, width - 1))
    ties = [tied] if tied else []
    return table(entries), costs, budgets, equal, ties, pinned

  return draw_case()


def assert_best(case):
  sensitivity, costs, budgets, equal, ties, pinned = case
  expected = brute_force(*case)
  options = {"equal": equal, "ties": ties, "pinned": pinned}
  if expected is None:
    with pytest.raises(allocate.Infeasible):
      allocate.solve(sensitivity, costs, budgets, **options)
    return
  found = allocate.solve(sensitivity, costs, budgets, **options)
  assert found.index.tolist() == expected
  chosen = sensitivity[np.arange(len(expected)), expected]
  assert found.objective == math.fsum(chosen)


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(cases(st.integers(-2, 2).map(float)))
def test_the_solution_is_the_first_of_all_optimal_ones(case):
  assert_best(case)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(cases(st.integers(0, 1).map(float)))
def test_a_split_search_without_incumbent_finds_the_same(case):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(branch_and_bound, "_MAX_STATES", 1)
    patch.setattr(branch_and_bound, "_incumbent", lambda program: None)
    assert_best(case)


def test_ties_are_broken_by_budgets_in_order_then_by_layers():
  costs = {"a": [[4, 4]], "b": [[5, 3]], "c": [[1, 2]]}
  budgets = dict.fromkeys(costs, 9)
  found = allocate.solve([[0.0, 0.0]], costs, budgets)
  assert found.index.tolist() == [1]
  costs = {"a": [[1, 0], [2, 0], [1, 0]]}
  found = allocate.solve(
    np.zeros((3, 2)), costs, {"a": 2}, equal="a", ties=[[2, 0]]
  )
  assert found.index.tolist() == [0, 1, 0]


@pytest.mark.parametrize("v", [0, 1])
def test_the_first_of_equal_solutions_wins_whichever_layer_is_split(
  monkeypatch, v
):
  monkeypatch.setattr(branch_and_bound, "_MAX_STATES", 1)
  monkeypatch.setattr(
    branch_and_bound._Enumeration, "branching", lambda self: v
  )
  costs = {"bits": [[4, 2], [4, 2]]}
  budgets = {"bits": 6}
  found = allocate.solve(np.zeros((2, 2)), costs, budgets, equal=["bits"])
  assert found.index.tolist() == [0, 1]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(cases(st.floats(-1e300, 1e300)))
def test_sums_are_compared_exactly_however_far_apart(case):
  assert_best(case)


@pytest.mark.parametrize("seed", range(12))
def test_entries_over_eleven_orders_of_magnitude_match_brute_force(seed):
  """Against all 4^8 allocations, each summed by fsum."""
  rng = np.random.default_rng(seed)
  layers, rows = 8, 1 + seed % 3
  sensitivity = 10 ** rng.uniform(-6, 5, (layers, 4 if seed % 2 else 1))
  sensitivity = sensitivity * 4.0 ** -np.array([8, 6, 4, 2]) * 4
  sensitivity = sensitivity * rng.uniform(0.5, 1, (layers, 4))
  bits = np.array([8, 6, 4, 2])
  costs = {
    str(m): rng.integers(1, 10 ** (3 + m), (layers, 1)) * bits ** (1 + m % 2)
    for m in range(rows)
  }
  budgets = {n: allocate.between(c, 0.4) for n, c in costs.items()}
  index = np.array(list(itertools.product(range(4), repeat=layers)))
  chosen = np.arange(layers), index
  feasible = np.logical_and.reduce(
    [c[chosen].sum(1) <= budgets[n] for n, c in costs.items()]
  )
  sums = [math.fsum(row) for row in sensitivity[chosen][feasible].tolist()]
  found = allocate.solve(sensitivity, costs, budgets)
  assert found.objective == min(sums)
  assert index[feasible][np.argmin(sums)].tolist() == found.index.tolist()
  for name, cost in costs.items():
    assert found.usage[name] == cost[np.arange(layers), found.index].sum()


def golden_problem(instance):
  costs = {c["kind"]: np.array(c["cost"]) for c in instance["constraints"]}
  budgets = {c["kind"]: c["budget"] for c in instance["constraints"]}
  equal = [c["kind"] for c in instance["constraints"] if c["sense"] == "=="]
  return costs, budgets, {"equal": equal, "ties": instance["tie_groups"]}


@pytest.mark.parametrize("scale", SCALES)
def test_all_golden_problems_are_solved_at_every_scale(golden, scale):
  file = golden("ilp.json")
  feasible = 0
  for instance in file["instances"] + file["extra"]:
    costs, budgets, options = golden_problem(instance)
    sensitivity = np.array(instance["sensitivity"])
    sensitivity = sensitivity * (scale / sensitivity.max())
    if not instance["feasible"]:
      with pytest.raises(allocate.Infeasible):
        allocate.solve(sensitivity, costs, budgets, **options)
      continue
    feasible += 1
    found = allocate.solve(sensitivity, costs, budgets, **options)
    bits = [instance["bits"][j] for j in found.index]
    assert bits == instance["assignment_bits"], instance["name"]
    assert list(found.usage.values()) == instance["usage"]
    if scale == 1.0:
      original = np.array(instance["sensitivity"])
      found = allocate.solve(original, costs, budgets, **options)
      assert found.objective == instance["optimal_objective"]
  assert feasible > 10


def test_a_solution_has_numpy_integers_and_python_sums():
  found = allocate.solve(
    np.array([[1, 2]], np.float32), {"size": [[4, 2]], "time": [[1, 3]]}, {}
  )
  assert found.index.dtype == np.int64
  assert type(found.objective) is float
  assert found.usage == {"size": 4, "time": 1}
  assert all(type(value) is int for value in found.usage.values())


def test_costs_beyond_the_integers_of_a_float_are_exact():
  large = 2**54
  costs = {"bops": [[large + 1, 0], [large, 0]]}
  sensitivity = [[0.0, 4.0], [0.0, 5.0]]
  for budget, index in [
    (2 * large + 1, [0, 0]),
    (2 * large, [1, 0]),
    (large, [1, 0]),
    (large - 1, [1, 1]),
  ]:
    found = allocate.solve(sensitivity, costs, {"bops": budget})
    assert found.index.tolist() == index, budget
  assert allocate.solve(sensitivity, costs, {"bops": 10**30}).usage == {
    "bops": 2 * large + 1
  }
  with pytest.raises(
    ValueError, match=r"costs\['bops'\] must be < 2\^62 in sum over the"
  ):
    allocate.solve([[0.0]], {"bops": [[2**62]]}, {"bops": 1})


def test_many_layers_with_equal_sensitivities_take_the_cheapest():
  rng = np.random.default_rng(0)
  costs = {n: rng.integers(1, 10**6, (40, 4)) for n in ("size", "bops")}
  budgets = {n: int(c.sum(0).max()) for n, c in costs.items()}
  found = allocate.solve(np.zeros((40, 4)), costs, budgets)
  cheapest = allocate.solve(costs["size"], costs, budgets)
  assert found.usage["size"] == cheapest.objective
  assert found.usage["size"] > costs["size"].min(1).sum()


@pytest.mark.parametrize("seed", range(3))
def test_a_split_search_finds_what_one_search_finds(monkeypatch, seed):
  rng = np.random.default_rng(seed)
  bits = np.array([8, 6, 4, 2])
  sensitivity = np.exp(rng.normal(0, 2, (11, 1))) * 4.0**-bits
  costs = {
    "size": rng.integers(10**3, 10**6, (11, 1)) * bits,
    "bops": rng.integers(10**5, 10**8, (11, 1)) * bits**2,
  }
  budgets = {n: allocate.between(c, 0.4) for n, c in costs.items()}
  whole = allocate.solve(sensitivity, costs, budgets)
  monkeypatch.setattr(branch_and_bound, "_MAX_STATES", 3)
  monkeypatch.setattr(branch_and_bound, "_MAX_DOMINATORS", 0)
  monkeypatch.setattr(branch_and_bound, "_incumbent", lambda program: None)
  split = allocate.solve(sensitivity, costs, budgets)
  assert split.index.tolist() == whole.index.tolist()


def infeasible(*args, **options):
  with pytest.raises(allocate.Infeasible) as error:
    allocate.solve(*args, **options)
  assert "\n" not in str(error.value)
  return error.value


@pytest.mark.parametrize(
  ("options", "smallest"),
  [({}, 9), ({"ties": [[0, 1]]}, 11), ({"pinned": {2: 0}}, 13)],
)
def test_a_single_budget_names_its_smallest_value(options, smallest):
  costs = {"size": [[8, 2], [4, 6], [7, 3]]}
  losses = np.zeros((3, 2))
  error = infeasible(losses, costs, {"size": smallest - 1}, **options)
  assert error.budget == "size"
  assert error.smallest == smallest
  assert error.feasible == (smallest,)
  assert str(error) == (
    f"budgets['size']={smallest - 1} is infeasible: no allocation is so "
    f"small; feasible is budgets['size'] >= {smallest}"
  )
  found = allocate.solve(losses, costs, {"size": smallest}, **options)
  assert found.usage == {"size": smallest}


def test_of_several_budgets_each_is_reported_within_the_others():
  costs = {"size": [[8, 2], [8, 2]], "time": [[1, 9], [2, 7]]}
  error = infeasible(np.zeros((2, 2)), costs, {"size": 9, "time": 9})
  assert error.budget == "size"
  assert error.smallest == 10
  assert str(error) == (
    "budgets['size']=9 is infeasible: no allocation is so small within the "
    "budgets of 'time'; feasible is budgets['size'] >= 10 or else "
    "budgets['time'] >= 16"
  )


def test_budgets_that_contradict_each_other_are_named_without_the_rest():
  costs = {
    "loose": [[1, 1], [1, 1]],
    "size": [[8, 2], [8, 2]],
    "time": [[5, 9], [5, 9]],
  }
  budgets = {"loose": 1, "size": 4, "time": 10}
  error = infeasible(np.zeros((2, 2)), costs, budgets)
  assert error.budget == "loose"
  assert error.feasible == (2,)
  budgets = {"loose": 2, "size": 3, "time": 9}
  error = infeasible(np.zeros((2, 2)), costs, budgets)
  assert error.budget == "size"
  assert error.feasible == (4,)
  assert "within" not in str(error)


@pytest.mark.parametrize(
  ("budget", "feasible", "smallest"),
  [(7, (6, 8), 8), (3, (4,), 4), (17, (16,), None), (2**70, (16,), None)],
)
def test_an_exact_budget_names_the_nearest_ones(budget, feasible, smallest):
  costs = {"bits": [[8, 6, 4, 2]] * 2}
  error = infeasible(np.zeros((2, 4)), costs, {"bits": budget}, equal=["bits"])
  assert error.feasible == feasible
  assert error.smallest == smallest
  assert str(error).endswith(
    "no allocation meets it exactly; feasible is budgets['bits'] "
    + " or ".join(map(str, feasible))
  )


def test_the_search_for_a_nearest_exact_budget_has_a_limit(monkeypatch):
  monkeypatch.setattr(branch_and_bound, "_MAX_NODES", 1)
  module = importlib.import_module("dr_jax.allocate.solve")
  monkeypatch.setattr(module, "_MAX_SPLITS", 3)
  rng = np.random.default_rng(0)
  costs = {"size": rng.integers(10**8, 10**9, (60, 4)) * 2}
  odd = int(costs["size"].min(1).sum()) + 10**9 + 1
  error = infeasible(np.zeros((60, 4)), costs, {"size": odd}, equal=["size"])
  assert error.budget == "size"
  assert error.feasible == ()
  assert error.smallest is None
  assert str(error).endswith("feasible is unknown")


SENSITIVITY = [[1.0, 2.0], [3.0, 4.0]]
COSTS = {"size": [[4, 2], [4, 2]]}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"sensitivity": [1.0, 2.0]},
      r"sensitivity must be one .* got float64 \(2,\)",
    ),
    ({"sensitivity": np.zeros((0, 2))}, r"sensitivity must .*\(0, 2\)"),
    ({"sensitivity": [["a"]]}, r"sensitivity must .*<U1 \(1, 1\)"),
    (
      {"sensitivity": [[1, 2], [np.nan, 3]]},
      r"sensitivity\[1, 0\] must be finite, got nan",
    ),
    (
      {"sensitivity": [[1, -np.inf], [2, 3]]},
      r"\[0, 1\] must be finite, got -inf",
    ),
    (
      {"costs": {"size": [[4, 2]]}},
      r"costs\['size'\] must have .*\(2, 2\), got \(1, 2\)",
    ),
    (
      {"costs": {"size": [[4, 2], [4, -1]]}},
      r"costs\['size'\]\[1, 1\] must be an integer >= 0, got -1",
    ),
    ({"costs": {"size": [[4, 2.0], [4, 2]]}}, r"\[0, 0\] must be .* got 4.0"),
    ({"costs": {"size": [[True] * 2] * 2}}, r"costs\['size'\].* got True"),
    ({"budgets": {"sise": 4}}, r"budgets must be .*\['size'\], got 'sise'"),
    ({"budgets": {"size": 0}}, r"budgets\['size'\] must be .* >= 1, got 0"),
    ({"budgets": {"size": 4.0}}, r"budgets\['size'\] must be .* got 4.0"),
    ({"budgets": {"size": True}}, r"budgets\['size'\] must be .* got True"),
    ({"equal": ["bops"]}, r"equal must be .*\['size'\], got 'bops'"),
    ({"equal": "bops"}, r"equal must be .* got 'bops'"),
    ({"ties": [[0, 2]]}, r"ties must be an integer in 0\.\.1, got 2"),
    ({"ties": [[-1, 0]]}, "ties must be .* got -1"),
    ({"ties": [[0], [1, 0]]}, "ties must have each layer once, got 0 twice"),
    ({"ties": [[0, 1.0]]}, "ties must be .* got 1.0"),
    ({"ties": [0, 1]}, r"ties must be groups .* got \[0, 1\]"),
    ({"pinned": {2: 0}}, r"pinned must be an integer in 0\.\.1, got 2"),
    ({"pinned": {0: 2}}, r"pinned\[0\] must be an integer in 0\.\.1, got 2"),
    ({"pinned": {0: -1}}, r"pinned\[0\] must be .* got -1"),
    ({"pinned": {0.0: 1}}, "pinned must be .* got 0.0"),
    (
      {"ties": [[0, 1]], "pinned": {0: 1, 1: 0}},
      r"pinned\[1\] must be 1, as for .*\(0, 1\), got 0",
    ),
  ],
)
def test_wrong_arguments_are_named_in_one_line(change, message):
  arguments = {
    "sensitivity": SENSITIVITY,
    "costs": COSTS,
    "budgets": {"size": 6},
  }
  with pytest.raises(ValueError, match=message) as error:
    allocate.solve(**(arguments | change))
  assert not isinstance(error.value, allocate.Infeasible)
  assert "\n" not in str(error.value)
  assert " must " in str(error.value)


def test_one_name_may_stand_for_the_exact_budgets():
  found = allocate.solve(SENSITIVITY, COSTS, {"size": 6}, equal="size")
  assert found.usage == {"size": 6}
