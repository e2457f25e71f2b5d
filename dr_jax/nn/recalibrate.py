"""Batch norm statistics for an assignment of bits that was not trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax.nn.inputs import Inputs
from dr_jax.nn.leaves import name_of
from dr_jax.nn.norm import BatchNorm


def recalibrate(model: nnx.Module, batches: Iterable[Any]) -> None:
  """Re-estimates batch norm statistics for the bits in use, in place.

  For an assignment that was not trained: statistics become the plain average
  over the batches, in the rows that the assignment uses; nothing else changes.

  Args:
    model: a quantized network, set to the assignment by `nn.set_bits`.
    batches: inputs [batch, ...], tuples of all positional arguments, or
      `nn.Inputs` with keyword arguments.

  Raises:
    ValueError: if there is no batch, or a norm did not see the batches or is
      set to use its running average.
  """
  norms = _norms(model)
  if not norms:
    raise ValueError(
      "model must have a batch norm that collects statistics, as what "
      "nn.quantize returned (a loaded artifact has folded norms)"
    )
  fresh = nnx.clone(model)
  fresh.eval()
  for norm in _norms(fresh).values():
    norm.use_running_average = False
    norm.momentum = 0.0
  graph, state = nnx.split(fresh)

  @jax.jit
  def statistics(state, inputs):
    merged = nnx.merge(graph, state, copy=True)
    found = _norms(merged)
    before = {path: norm.mean.get_value() for path, norm in found.items()}
    merged(*inputs.args, **inputs.kwargs)
    for path, norm in found.items():
      if norm.mean.get_value() is before[path]:
        raise ValueError(
          f"norm {name_of(path)} must update its statistics, but "
          "the model's call keeps them: leave use_running_average to "
          "model.train() and model.eval(), and pass batches that reach every "
          "norm"
        )
    return {p: (n.mean[n.row], n.var[n.row]) for p, n in found.items()}

  total, count = None, 0
  for batch in batches:
    seen = statistics(state, Inputs.of(batch))
    total = seen if total is None else jax.tree.map(jnp.add, total, seen)
    count += 1
  if total is None:
    raise ValueError("batches must not be empty")
  for path, sums in total.items():
    norm = norms[path]
    for statistic, value in zip((norm.mean, norm.var), sums, strict=True):
      rows = statistic[...].at[norm.row].set(value / count)
      statistic.set_value(rows)


def _norms(model) -> dict[tuple, BatchNorm]:
  """The batch norms of a network by path."""
  return {
    path: module
    for path, module in nnx.iter_modules(model)
    if isinstance(module, BatchNorm)
  }
