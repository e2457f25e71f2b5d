"""Traces of the blocks of a Hessian, one per layer, by Hutchinson's method.

  trace(H_l) = E[ v_l . (H v)_l ],   v of random signs

One product H v serves every layer: the signs of the other layers only add
noise of mean zero. Hutchinson, Communications in Statistics 18, 1989; for
bit-widths of layers, HAWQ-V2, arXiv 1911.03852, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.hessian.hvp import check_mode, dots, value_and_hvp
from dr_jax.runtime.tree import named_leaves

if TYPE_CHECKING:
  from jaxtyping import Array, Float, PyTree


class TraceEstimate(NamedTuple):
  """The trace of one layer's block of the Hessian, with its error bar.

  Attributes:
    mean: the estimate; negative where the loss curves down.
    stderr: standard error of the mean, in the same units; infinite after one
      probe.
    probes: number of random vectors that it is the mean of.
  """

  mean: float
  stderr: float
  probes: int


def trace(
  loss: Callable[[Any, Any], Float[Array, ""]],
  params: PyTree,
  key: Array,
  batches: Sequence[PyTree],
  *,
  select: Collection[str] | Callable[[str], bool] | None = None,
  rel_stderr: float = 0.05,
  min_probes: int = 8,
  max_probes: int = 512,
  mode: str = "forward_over_reverse",
  jit: Callable = jax.jit,
  on_probe: Callable[[int, dict[str, TraceEstimate]], None] | None = None,
) -> dict[str, TraceEstimate]:
  """Estimates the trace of the loss's Hessian in every selected leaf.

  Probes are added until, for every selected leaf, the standard error is at
  most rel_stderr times the size of the mean. A leaf whose trace is about zero
  never gets there: the run then ends at max_probes, and its stderr shows it.

  The Hessian is that of the mean over all examples of all batches: each probe
  meets every batch, and batches count by their number of examples. Batches may
  be sharded over the axis "data" of a mesh and params replicated, with Auto or
  Explicit axes: the result is the same up to rounding.

  Args:
    loss: loss(params, batch) -> scalar, a mean over the examples of the batch.
      Batch norm belongs in inference mode: its batch statistics would tie the
      examples to each other.
    params: pytree of arrays; the selected ones floating.
    key: PRNG key. Probe n draws from fold_in(key, n), so the first n probes
      are the same however many follow.
    batches: pytrees of arrays [examples, ...], passed over once per probe.
      Sizes that differ compile a program each.
    select: slash paths, or a function of the path; None for all leaves. The
      others are not differentiated, and cost nothing.
    rel_stderr: standard error over |mean| at which to stop, above 0.
    min_probes: probes before which the error bar is not trusted, at least 2.
    max_probes: probes after which to stop in any case.
    mode: how H v is taken; see `hvp`.
    jit: compiles the program, as `jax.jit` does.
    on_probe: called with n and the estimates so far after probe n = 1, 2, ...

  Returns:
    {slash path: estimate}, in the order of params.

  Raises:
    ValueError: if an argument is outside of what is said above, a path of
      select is not in params, or the loss or H v is NaN or infinite.

  >>> loss = lambda params, batch: (params["w"] ** 2 * batch).mean()
  >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])]
  >>> trace(loss, {"w": jnp.ones(2)}, jax.random.key(0), batches)
  {'w': TraceEstimate(mean=5.0, stderr=0.0, probes=8)}
  """
  check_mode(mode)
  _check_stopping(rel_stderr, min_probes, max_probes)
  leaves, structure = named_leaves(params), jax.tree.structure(params)
  selected = {path: leaves[path] for path in _selected(leaves, select)}
  rest = {path: leaf for path, leaf in leaves.items() if path not in selected}
  weights = _shares(batches)

  @jit
  def sample(selected, rest, key, number, batch):
    def loss_of(selected, batch):
      merged = {**selected, **rest}
      return loss(structure.unflatten(merged[path] for path in leaves), batch)

    v = _signs(jax.random.fold_in(key, number), selected)
    value, product = value_and_hvp(loss_of, selected, v, batch, mode=mode)
    samples = dots(v, product)
    return value, jnp.stack([samples[path] for path in selected])

  mean, squares = np.zeros(len(selected)), np.zeros(len(selected))
  estimates: dict[str, TraceEstimate] = {}
  for number in range(max_probes):
    samples = np.zeros(len(selected))
    for i, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
      value, parts = sample(selected, rest, key, number, batch)
      _check_finite(f"loss of batch {i}", value)
      for path, part in zip(selected, np.asarray(parts), strict=True):
        _check_finite(f"{path}: v.Hv of batch {i}", part)
      samples += weight * np.asarray(parts, np.float64)
    # Welford's update: a difference of two large sums would lose small errors.
    probes = number + 1
    change = samples - mean
    mean = mean + change / probes
    squares = squares + change * (samples - mean)
    stderr = _stderr(squares, probes)
    estimates = {
      path: TraceEstimate(float(m), float(s), probes)
      for path, m, s in zip(selected, mean, stderr, strict=True)
    }
    if on_probe is not None:
      on_probe(probes, estimates)
    if probes >= min_probes and (stderr <= rel_stderr * np.abs(mean)).all():
      break
  return estimates


def sensitivity(
  estimates: Mapping[str, TraceEstimate], parameters: Mapping[str, int]
) -> dict[str, float]:
  """Returns trace / number of parameters of every layer, signs kept.

  The mean eigenvalue of the layer's block: what an error in one of its weights
  costs, on average over directions.

  Args:
    estimates: from `trace`.
    parameters: {path: number of parameters}; may hold more paths.

  Raises:
    ValueError: if a path is missing, or its number is below 1.

  References:
    HAWQ-V2, arXiv 1911.03852, section 3.1 (the average trace).

  >>> estimates = {"a": TraceEstimate(6.0, 0.1, 8)}
  >>> sensitivity(estimates, {"a": 3})
  {'a': 2.0}
  """
  for path in estimates:
    if parameters.get(path, 0) < 1:
      raise ValueError(
        f"parameters[{path!r}] must be >= 1, got {parameters.get(path)}"
      )
  return {path: e.mean / parameters[path] for path, e in estimates.items()}


def _signs(key, leaves):
  keys = jax.random.split(key, len(leaves))
  return {
    path: jax.random.rademacher(k, leaf.shape, leaf.dtype)
    for k, (path, leaf) in zip(keys, leaves.items(), strict=True)
  }


def _stderr(squares, probes):
  if probes < 2:
    return np.full_like(squares, np.inf)
  return np.sqrt(squares / (probes - 1) / probes)


def _selected(leaves, select):
  known = ", ".join(leaves)
  if callable(select):
    chosen = [path for path in leaves if select(path)]
  elif select is None:
    chosen = list(leaves)
  else:
    names = [select] if isinstance(select, str) else list(select)
    unknown = [name for name in names if name not in leaves]
    if unknown:
      raise ValueError(f"select must be of {known}, got {', '.join(unknown)}")
    chosen = [path for path in leaves if path in names]
  if not chosen:
    raise ValueError(f"select must select some of {known}, got {select}")
  for path in chosen:
    dtype = jax.typeof(leaves[path]).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"select must be of floating arrays, but {path} is {dtype}"
      )
  return chosen


def _shares(batches):
  """Returns each batch's fraction of all examples, float64 [batches]."""
  if isinstance(batches, Iterator):
    raise ValueError(
      "batches must be a sequence, as a list, which can be iterated more than "
      f"once, got {type(batches).__name__}"
    )
  examples = []
  for i, batch in enumerate(batches):
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or not all(size and size[0] for size in sizes):
      raise ValueError(
        f"batches[{i}] must have the same number of examples, >= 1, in all its "
        f"arrays, got leading axes {sorted(sizes)}"
      )
    examples.append(sizes.pop()[0])
  if not examples:
    raise ValueError("batches must not be empty")
  return np.array(examples) / sum(examples)


def _check_stopping(rel_stderr, min_probes, max_probes):
  if not rel_stderr > 0:
    raise ValueError(f"rel_stderr must be > 0, got {rel_stderr}")
  if min_probes < 2:
    raise ValueError(
      f"min_probes must be >= 2, to have an error bar, got {min_probes}"
    )
  if max_probes < min_probes:
    raise ValueError(
      f"max_probes must be >= min_probes={min_probes}, got {max_probes}"
    )


def _check_finite(field, value):
  if not np.isfinite(value):
    raise ValueError(f"{field} must be finite, got {value}")
