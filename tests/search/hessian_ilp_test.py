"""Tests of allocation by Hessian traces."""

import math

import jax.numpy as jnp
import numpy as np
import problems
import pytest
from flax import nnx

from dr_jax import nn, quant, search


def sensitive(seed=0, **fields):
  """A problem whose "error" is its damage and whose "bits" is another."""
  damage = problems.damage(6, problems.BITS, seed)
  other = problems.damage(6, problems.BITS, seed + 50)
  tables = {"error": damage, "bits": other}
  return problems.problem(seed=seed, sensitivity=tables, **fields)


def objective(problem, index, name="error"):
  return math.fsum(problem.sensitivity[name][np.arange(len(index)), index])


@pytest.mark.parametrize("seed", range(4))
def test_where_the_objective_is_the_damage_the_answer_is_the_best(seed):
  problem = sensitive(seed, ties=((1, 4),))
  budgets = problems.budgets(problem)
  best = problems.best(problem, budgets)
  alone = problems.search(
    search.hessian_ilp, problem, budgets, max_candidates=1
  )
  assert problems.index_of(problem, alone) == best
  assert alone.evaluations == 1
  assert problems.index_of(
    problem, problems.search(search.hessian_ilp, problem, budgets)
  ) == (best)


def test_candidates_are_the_optima_with_one_group_held_lower():
  problem = sensitive(ties=((1, 4),), pinned={2: 1})
  budgets = problems.budgets(problem)
  found = problems.search(search.hessian_ilp, problem, budgets)

  def least(fits):
    every = problems.assignments(problem)
    fitting = (i for i in every if problem.fits(i, budgets) and fits(i))
    return min(fitting, key=lambda i: objective(problem, i))

  first = least(lambda index: True)
  expected = {first}
  for layer in (0, 1, 3, 5):
    for position in range(first[layer] + 1, 4):
      expected.add(least(lambda i, at=layer, to=position: i[at] == to))
  assert len(expected) >= 5
  assert {trial.index for trial in found.trials} == expected
  assert found.trials[0].index == first


def test_a_neighbor_wins_where_the_objective_is_wrong():
  """The damage of layer 0 at the optimum is far above its sensitivity."""
  problem = sensitive()
  budgets = problems.budgets(problem)
  first = problem.solve(problem.sensitivity["error"], budgets)
  problem.evaluate.score.damage[0, first[0]] += 10
  result = problems.search(search.hessian_ilp, problem, budgets)
  index = problems.index_of(problem, result)
  assert index != first
  assert result.loss == min(
    t.loss for t in result.trials if problem.fits(t.index, budgets)
  )
  alone = problems.search(
    search.hessian_ilp, problem, budgets, max_candidates=1
  )
  assert problems.index_of(problem, alone) == first
  assert alone.loss > result.loss + 5


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_the_candidates_of_lowest_objective_are_scored(most):
  problem = sensitive()
  budgets = problems.budgets(problem)
  every = problems.search(search.hessian_ilp, problem, budgets).trials
  some = problems.search(
    search.hessian_ilp, problem, budgets, max_candidates=most
  ).trials
  values = sorted(objective(problem, t.index) for t in every)
  assert [objective(problem, t.index) for t in some] == values[:most]


def test_either_table_can_be_the_objective():
  problem = sensitive()
  budgets = problems.budgets(problem)
  result = problems.search(
    search.hessian_ilp, problem, budgets, objective="bits", max_candidates=1
  )
  expected = min(
    (i for i in problems.assignments(problem) if problem.fits(i, budgets)),
    key=lambda i: objective(problem, i, "bits"),
  )
  assert problems.index_of(problem, result) == expected
  assert expected != problems.best(problem, budgets)


def test_bits_that_cannot_be_held_are_skipped():
  """Two layers at the slow position are over the budget, one is not."""
  latency = np.array([[9, 5, 8], [9, 5, 8], [9, 5, 12]])
  problem = problems.problem(
    3,
    (8, 4, 2),
    costs={"latency": latency},
    sensitivity={"error": problems.damage(3, (8, 4, 2))},
  )
  result = problems.search(search.hessian_ilp, problem, {"latency": 18})
  assert {t.index for t in result.trials} == {(1, 1, 1), (2, 1, 1), (1, 2, 1)}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"objective": "fisher"},
      "objective must be one of the sensitivities error, bits, got",
    ),
    ({"max_candidates": 0}, "max_candidates must be an integer >= 1, got 0"),
    ({"max_candidates": 2.0}, "max_candidates must be .* got 2.0"),
  ],
)
def test_wrong_options_are_named(options, message):
  problem = sensitive()
  with pytest.raises(ValueError, match=message):
    problems.search(
      search.hessian_ilp, problem, problems.budgets(problem), **options
    )
  assert problem.evaluate.score.calls == []


def test_a_search_without_sensitivities_raises_an_error():
  problem = problems.problem(sensitivity={})
  with pytest.raises(ValueError, match=r"\(none\), got 'error'"):
    problems.search(search.hessian_ilp, problem, problems.budgets(problem))


def test_sensitivities_of_another_shape_raise_an_error_that_names_them():
  problem = problems.problem(sensitivity={"error": np.ones((6, 3))})
  with pytest.raises(ValueError, match=r"^sensitivity\['error'\] .*\(6, 3\)"):
    problems.search(search.hessian_ilp, problem, problems.budgets(problem))


def test_tables_are_traces_over_parameters_times_errors_and_bits():
  tables = search.sensitivity_tables(
    traces=[6.0, -4.0, 1.0],
    parameters=[3, 2, 4],
    bits=(8, 2),
    errors=[[1.0, 5.0], [1.0, 7.0], [0.0, 8.0]],
  )
  assert tables["error"].dtype == tables["bits"].dtype == np.float64
  np.testing.assert_array_equal(tables["error"], [[2, 10], [0, 0], [0, 2]])
  np.testing.assert_array_equal(tables["bits"], [[-16, -4], [0, 0], [-2, -0.5]])


def test_more_bits_go_to_sensitive_layers():
  """ "Minimal", as the paper prints it, would do the opposite."""
  tables = search.sensitivity_tables(
    [100.0, 1.0], [10, 10], (8, 4, 2), np.zeros((2, 3))
  )
  costs = {"sum_bits": np.array([[8, 4, 2], [8, 4, 2]])}
  problem = problems.problem(2, (8, 4, 2), costs=costs, sensitivity=tables)
  index = problem.solve(tables["bits"], {"sum_bits": 10})
  assert index == (0, 2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"parameters": [3]}, r"parameters must have shape \(2,\), got \(1,\)"),
    ({"parameters": [3, 0]}, r"parameters\[1\] must be >= 1, got 0.0"),
    ({"errors": [[1, 2]]}, r"errors must have shape \(2, 2\), got \(1, 2\)"),
    ({"traces": [1, math.nan]}, r"traces\[1\] must be finite, got nan"),
    (
      {"errors": [[1, 2], [3, math.inf]]},
      r"errors\[1\] must be finite, got .*inf",
    ),
  ],
)
def test_wrong_tables_are_named(change, message):
  right = {
    "traces": [1.0, 2.0],
    "parameters": [3, 4],
    "bits": (8, 4),
    "errors": [[0, 1], [0, 1]],
  }
  with pytest.raises(ValueError, match=message):
    search.sensitivity_tables(**{**right, **change})


class Net(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


BITS = (8, 4, 2)


@pytest.fixture(scope="module")
def network():
  model = Net(nnx.Rngs(0))
  return nn.quantize(
    model,
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=jnp.ones((2, 5, 5, 2)),
    skip=(),
  )


def test_quantization_errors_follow_the_formula(network):
  errors = search.quantization_errors(network)
  assert errors.shape == (2, 3)
  assert errors.dtype == np.float64
  for row, layer in zip(errors, (network.conv, network.head), strict=True):
    w = np.asarray(layer.kernel[...], np.float64)
    s = np.asarray(layer.weight_params["scale"][...], np.float64)
    high = np.clip(np.rint(w / s), -128, 127)
    for found, b in zip(row, BITS, strict=True):
      step = 2 ** (8 - b)
      ends = -(2 ** (b - 1)), 2 ** (b - 1) - 1
      quantized = np.clip(np.rint(high / step), *ends) * s * step
      # Float32 products of codes and scales, against float64.
      np.testing.assert_allclose(
        found, np.square(quantized - w).sum(), rtol=1e-4
      )
  assert (np.diff(errors, axis=1) > 0).all()


def test_quantization_errors_do_not_depend_on_the_bits_in_use(network):
  before = search.quantization_errors(network)
  nn.set_bits(network, 2)
  np.testing.assert_array_equal(search.quantization_errors(network), before)
  assert [row.bits for row in nn.layer_table(network)] == [2, 2]


def test_a_layer_without_float_weights_is_named(network):
  stored = nn.deployed.assemble(Net(nnx.Rngs(1)), nn.deployed.parts_of(network))
  with pytest.raises(
    ValueError, match="layer 'conv' must have a float kernel, but holds"
  ):
    search.quantization_errors(stored)


def test_a_float_network_has_no_quantization_errors():
  with pytest.raises(
    ValueError, match="model must have a quantized layer; call"
  ):
    search.quantization_errors(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
