import numpy as np
import pytest

from dr_jax import allocate


def test_costs_are_exact_products():
  stored = allocate.stored_bits([432, 2304], (8, 4))
  assert stored.dtype == np.int64
  assert stored.tolist() == [[3456, 1728], [18432, 9216]]
  big = 10**13 + 1
  assert allocate.bops([big], (8, 2)).tolist() == [[big * 64, big * 4]]
  assert allocate.bops([3], (8, 2), (8, 4)).tolist() == [[192, 24]]
  assert allocate.mean_bits(2, (8, 4)).tolist() == [[8, 4], [8, 4]]


@pytest.mark.parametrize(
  ("mean", "layers", "budget"),
  [(3.5, 3, 10), (4, 18, 72), (3.3, 10, 33), (np.float64(2.999), 1000, 2999)],
)
def test_a_mean_becomes_the_largest_sum_within_it(mean, layers, budget):
  assert allocate.mean_bits_budget(mean, layers) == budget


def test_a_latency_table_becomes_nanoseconds():
  table = {"a": {8: 1e-6, 4: 7.5e-7}, "b": {8: 2e-3, 4: 1.6e-9, 2: 0.0}}
  nanoseconds = allocate.latency(table, ["b", "a"], (8, 4))
  assert nanoseconds.dtype == np.int64
  assert nanoseconds.tolist() == [[2_000_000, 2], [1000, 750]]


@pytest.mark.parametrize(
  ("fraction", "budget"), [(0, 5), (0.52, 15), (0.3, 11), (1, 25)]
)
def test_a_budget_lies_between_the_cheapest_and_the_most_expensive(
  fraction, budget
):
  assert allocate.between([[2, 17], [8, 3]], fraction) == budget


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: allocate.stored_bits([0], (8,)),
      "parameters must be an integer >= 1, got 0",
    ),
    (
      lambda: allocate.stored_bits([1.0], (8,)),
      r"parameters must be an integer >= 1, got 1\.0",
    ),
    (lambda: allocate.stored_bits([1], ()), "bits must not be empty"),
    (
      lambda: allocate.stored_bits([2**62], (8,)),
      r"cost must be < 2\^63, got 36893488147419103232",
    ),
    (
      lambda: allocate.bops([3], (8, 2), (8,)),
      r"activation_bits must be one.*got \(8,\)",
    ),
    (
      lambda: allocate.mean_bits(0, (8,)),
      "layers must be an integer >= 1, got 0",
    ),
    (
      lambda: allocate.mean_bits_budget(0.0, 3),
      r"mean must be > 0 and finite, got 0\.0",
    ),
    (
      lambda: allocate.mean_bits_budget(np.nan, 3),
      "mean must be > 0 and finite, got nan",
    ),
    (
      lambda: allocate.between([[1, 2]], 1.1),
      r"fraction must be in 0\.\.1, got 1\.1",
    ),
    (
      lambda: allocate.latency({}, ["a"], (8,)),
      r"table must have all layers of \['a'\], but lacks 'a'",
    ),
    (
      lambda: allocate.latency({"a": {8: 1.0}}, ["a"], (8, 4)),
      r"table\['a'\] must have all bits of \[8, 4\], but lacks 4",
    ),
    (
      lambda: allocate.latency({"a": {8: -1.0}}, ["a"], (8,)),
      r"table\['a'\]\[8\] must be seconds >= 0, got -1\.0",
    ),
    (
      lambda: allocate.latency({"a": {8: np.inf}}, ["a"], (8,)),
      r"table\['a'\]\[8\] must be seconds >= 0, got inf",
    ),
  ],
)
def test_wrong_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
