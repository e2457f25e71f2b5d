"""Allocation by prior knowledge: Hessian traces and an integer program.

  error  minimize sum_l (t_l / n_l) ||Q_b(W_l) - W_l||^2   (HAWQ-V2, -V3)
  bits   maximize sum_l (t_l / n_l) b_l                    (arXiv 2502.01199)

with t_l the trace of layer l's Hessian and n_l its number of parameters. The
second paper prints "minimal", which would starve the sensitive layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from dr_jax.allocate import Infeasible
from dr_jax.nn.bits import arrays_of
from dr_jax.nn.kernels import computed_kernels
from dr_jax.nn.quantized import candidates, quantized_layers
from dr_jax.nn.stored import Stored
from dr_jax.search.evaluator import Evaluator
from dr_jax.search.log import Result, SearchLog
from dr_jax.search.options import CountOrNone, Seed, check_options
from dr_jax.search.problem import Index, Problem

if TYPE_CHECKING:
  from flax import nnx
  from numpy.typing import ArrayLike

# The tables of `sensitivity_tables`.
OBJECTIVES = ("error", "bits")


def hessian_ilp(
  problem: Problem,
  budgets: Mapping[str, int],
  evaluate: Evaluator,
  sensitivity: Mapping[str, np.ndarray],
  *,
  seed: Seed = 0,
  objective: str = "error",
  max_candidates: CountOrNone = None,
) -> Result:
  """Solves for the objective, then scores the optimum and its neighbors.

  Neighbors: for every layer and every bit-width below its optimal one, the
  optimum with that layer held there, so that others rise. The best score wins.

  Args:
    problem, budgets, evaluate: what to assign, {cost: limit}, and the scores.
    sensitivity: {objective: float [L, B]}, to be minimized; for example what
      `sensitivity_tables` returns.
    seed: not used.
    objective: name of the table in `sensitivity` to minimize.
    max_candidates: number of assignments to score, those of lowest objective;
      None for all, at most 1 + L (B - 1). With 1 the objective alone decides.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: for an unknown objective, a table of another shape, or a wrong
      budget or number of candidates.

  References:
    arXiv 2502.01199, section 3.3; arXiv 2011.10680 (HAWQ-V3), section 3.4.
  """
  check_options(hessian_ilp, locals())
  log = SearchLog(problem, budgets, evaluate)
  if objective not in sensitivity:
    raise ValueError(
      "objective must be one of the sensitivities "
      f"{', '.join(sensitivity) or '(none)'}, got {objective!r}"
    )
  table = np.asarray(sensitivity[objective], np.float64)
  problem.check_table(f"sensitivity[{objective!r}]", table)

  def value(index):
    return math.fsum(table[np.arange(len(index)), index])

  neighbors = _candidates(problem, table, budgets)
  for index in sorted(neighbors, key=value)[:max_candidates]:
    log(index)
  return log.result()


def _candidates(
  problem: Problem, table: np.ndarray, budgets: Mapping[str, int]
) -> list[Index]:
  """The optimum, then what is optimal with one group held below it."""
  first = problem.solve(table, budgets)
  found = {first: None}
  for layer, *_ in problem.groups():
    for position in range(first[layer] + 1, len(problem.bits)):
      try:
        index = problem.solve(table, budgets, pinned={layer: position})
      except Infeasible:  # Where fewer bits take longer.
        continue
      found[index] = None
  return list(found)


def sensitivity_tables(
  traces: Sequence[float],
  parameters: Sequence[int],
  bits: Sequence[int],
  errors: ArrayLike,
) -> dict[str, np.ndarray]:
  """Returns the tables that `hessian_ilp` minimizes.

  A negative trace, from noise or a loss that is not convex, counts as 0: no
  error makes the network better.

  Args:
    traces: [L] Hessian traces t_l, of any sign.
    parameters: [L] numbers of parameters n_l, positive.
    bits: B candidate bit-widths.
    errors: [L, B], from `quantization_errors`.

  Returns:
    {"error": (t_l / n_l) errors, "bits": -(t_l / n_l) b}, float64 [L, B].

  Raises:
    ValueError: if shapes do not fit, or a trace or an error is not finite.

  >>> tables = sensitivity_tables([6.0, -1.0], [3, 5], (8, 2), [[0, 1], [0, 4]])
  >>> tables["error"].tolist(), tables["bits"].tolist()
  ([[0.0, 2.0], [0.0, 0.0]], [[-16.0, -4.0], [-0.0, -0.0]])

  References:
    HAWQ-V2, arXiv 1911.03852 (Omega); arXiv 2502.01199, section 3.3.
  """
  t, n = np.asarray(traces, float), np.asarray(parameters, float)
  squared = np.asarray(errors, float)
  shape = (len(t), len(bits))
  for name, array, expected in (
    ("parameters", n, shape[:1]),
    ("errors", squared, shape),
  ):
    if array.shape != expected:
      raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
  for name, array, wrong, rule in (
    ("traces", t, ~np.isfinite(t), "finite"),
    ("errors", squared, ~np.isfinite(squared).all(1), "finite"),
    ("parameters", n, ~(n >= 1), ">= 1"),
  ):
    if wrong.any():
      layer = int(wrong.argmax())
      raise ValueError(f"{name}[{layer}] must be {rule}, got {array[layer]}")
  weight = (np.maximum(t, 0) / n)[:, None]
  return {"error": weight * squared, "bits": -weight * np.asarray(bits, float)}


def quantization_errors(model: nnx.Module) -> np.ndarray:
  """Returns ||Q_b(W_l) - W_l||^2 of every layer at every bit-width.

  Args:
    model: quantized network with float kernels, not changed.

  Returns:
    float64 [L, B], layers in call order, bit-widths highest first.

  Raises:
    ValueError: for a model that is not quantized, or a layer that holds stored
      codes in place of a kernel.
  """
  candidates(model)
  found, kernels = quantized_layers(model), computed_kernels(model)
  for name, layer in found.items():
    if isinstance(layer, Stored):
      raise ValueError(
        f"layer {name!r} must have a float kernel, but holds stored codes"
      )
  return np.concatenate(
    [_errors(layer, kernels[id(layer)]) for layer in found.values()]
  )


def _errors(layer, kernel):
  """[layers of the stack, B]."""
  quantizer = layer.weight_quantizer
  positions = range(len(quantizer.bits))

  def quantized(params, w):
    return [quantizer.fake_quantize(params, w, i) for i in positions]

  for _ in layer.stack:
    quantized = jax.vmap(quantized)
  values = jax.jit(quantized)(arrays_of(layer.weight_params), kernel)
  errors = np.stack(values).astype(np.float64) - np.asarray(kernel, np.float64)
  inner = tuple(range(1 + len(layer.stack), errors.ndim))
  return np.square(errors).sum(inner).reshape(len(positions), -1).T
