"""One training step of a network at several bit-widths.

Schedules:
  alternate   for each bit-width, high to low: forward, backward, update
              (arXiv 2502.01199, algorithm A.2).
  accumulate  gradients of all bit-widths summed, one update (AdaBits,
              Any-Precision).
How the bit-widths become programs:
  unroll      one program holds all of them; constants of each bit-width fold.
  sequential  one program for any of them, called once per bit-width: compiles
              once, needs the memory of one.
  vmap        bit-widths as a batch dimension (accumulate only), which a mesh
              can spread over devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dr_jax.compilation import jit
from dr_jax.nn import Functional
from dr_jax.quant import SCALE_MAX, SCALE_MIN
from dr_jax.train import alrs as alrs_lib

SCHEDULES = ("alternate", "accumulate")
VECTORIZE = ("auto", "unroll", "sequential", "vmap")

# From `python -m dr_jax.benchmarks.joint_step`. Unrolled gradients that are
# only summed need four times the memory on CPU and gain little or nothing.
_FASTEST = {("cpu", "alternate"): "unroll", ("cpu", "accumulate"): "sequential"}

Batch = dict[str, jax.Array]
Step = Callable[["TrainState", Batch], tuple["TrainState", jax.Array]]


class TrainState(NamedTuple):
  """All that a run needs to go on, as one pytree of arrays.

  Attributes:
    step: int32, batches consumed; also the position in the data.
    params: trainable arrays, nested dict.
    opt_state: optimizer state.
    batch_stats: running statistics, nested dict.
    key: PRNG key of the run; step t draws from `fold_in(key, t)`.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  batch_stats: Any
  key: jax.Array


def init_state(
  network: Functional,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
) -> TrainState:
  """Returns the state at step 0, with its own copies of all arrays."""
  params, batch_stats = jax.tree.map(
    jnp.copy, (network.params, network.batch_stats)
  )
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    batch_stats=batch_stats,
    key=key,
  )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean cross-entropy; logits [n, classes], labels int [n]; float32."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  ).mean()


def resolve_vectorize(vectorize: str, schedule: str) -> str:
  """Returns the mode that "auto" stands for on this backend.

  Raises:
    ValueError: for unknown names, or "vmap" with the alternate schedule, whose
      updates depend on each other.
  """
  if schedule not in SCHEDULES:
    raise ValueError(f"schedule={schedule!r}: allowed are {SCHEDULES}")
  if vectorize not in VECTORIZE:
    raise ValueError(f"vectorize={vectorize!r}: allowed are {VECTORIZE}")
  if vectorize == "vmap" and schedule == "alternate":
    raise ValueError(
      "vectorize='vmap': allowed with schedule='accumulate' only; bit-widths "
      "that update one after the other cannot be a batch dimension"
    )
  if vectorize == "auto":
    return _FASTEST.get((jax.default_backend(), schedule), "unroll")
  return vectorize


def make_step(
  network: Functional,
  bits: tuple[int, ...],
  optimizer: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  *,
  schedule: str = "alternate",
  vectorize: str = "auto",
  alrs: str = "none",
  loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
) -> Step:
  """Builds the training step.

  Args:
    network: `nn.functional(model)`.
    bits: candidate bit-widths, highest first; any single entry for a float
      network.
    optimizer: from `make_optimizer`.
    learning_rate: step -> learning rate.
    schedule: "alternate" or "accumulate".
    vectorize: "unroll", "sequential", "vmap" or "auto".
    alrs: how scales learn at each bit-width; see `train.alrs`.
    loss: (logits, labels) -> scalar.

  Returns:
    step(state, batch) -> (state, losses [bits]). The state's buffers are
    donated. `batch` has "image" [n, ...] and "label" [n].

  Raises:
    ValueError: for a name that is not allowed.
  """
  vectorize = resolve_vectorize(vectorize, schedule)
  if alrs not in alrs_lib.MODES:
    raise ValueError(f"alrs={alrs!r}: allowed are {alrs_lib.MODES}")
  parts = _Parts(network, bits, optimizer, learning_rate, alrs, loss)
  build = {
    ("alternate", "unroll"): _alternate_unrolled,
    ("alternate", "sequential"): _alternate_sequential,
    ("accumulate", "unroll"): _accumulate_unrolled,
    ("accumulate", "sequential"): _accumulate_sequential,
    ("accumulate", "vmap"): _accumulate_vmapped,
  }
  return build[schedule, vectorize](parts)


class _Parts(NamedTuple):
  network: Functional
  bits: tuple[int, ...]
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  alrs: str
  loss: Callable


class _Gradients(NamedTuple):
  """Gradients of one or several bit-widths, summed.

  `weighted` and `total` are sums of factor * |gradient| and of |gradient| for
  the scales: their ratio, the mean ALRS factor, multiplies the update. With
  one bit-width in use it is that bit-width's factor.
  """

  params: Any
  weighted: Any
  total: Any


def _gradients(parts, state, batch_stats, batch, index):
  """Returns gradients, new batch statistics, and the loss at one bit-width."""

  def loss(params):
    logits, stats = parts.network.apply(
      params, batch_stats, index, batch["image"], train=True
    )
    return parts.loss(logits, batch["label"]), stats

  (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(
    state.params
  )
  scales = _only_scales(parts, gradients)
  learning_rate = jnp.float32(parts.learning_rate(state.step))
  eta = jnp.asarray(alrs_lib.eta(parts.bits), jnp.float32)[index]
  factor = alrs_lib.factor(
    parts.alrs, eta, alrs_lib.gradient_size(scales), learning_rate
  )
  total = jax.tree.map(jnp.abs, scales)
  weighted = jax.tree.map(lambda size: factor * size, total)
  return _Gradients(gradients, weighted, total), stats, value


def _apply(parts, state, gradients):
  """Returns the state after one optimizer update, at the same step number."""
  directions, opt_state = parts.optimizer.update(
    gradients.params, state.opt_state, state.params
  )
  rate = -jnp.float32(parts.learning_rate(state.step))
  params = jax.tree.map(
    lambda p, d: p + (rate * d).astype(p.dtype), state.params, directions
  )
  if jax.tree.leaves(gradients.total):
    old, direction = (
      _only_scales(parts, tree) for tree in (state.params, directions)
    )
    scales = jax.tree.map(
      _update_scale(rate), old, direction, gradients.weighted, gradients.total
    )
    params = _replace_scales(parts, params, scales)
  return state._replace(params=params, opt_state=opt_state)


def _update_scale(rate):
  def update(scale, direction, weighted, total):
    factor = jnp.where(total > 0, weighted / jnp.maximum(total, 1e-37), 0)
    new = scale + rate * factor * direction
    # Quantizers clamp what they read; the raw parameter must not drift away,
    # nor be lost to one overflowing gradient.
    new = jnp.clip(new, SCALE_MIN, SCALE_MAX)
    return jnp.where(jnp.isnan(new), scale, new)

  return update


def _only_scales(parts, tree):
  """The leaves that are learned scales, as a flat list."""
  kinds = jax.tree.leaves(parts.network.kinds)
  pairs = zip(jax.tree.leaves(tree), kinds, strict=True)
  return [leaf for leaf, kind in pairs if kind == "scale"]


def _replace_scales(parts, params, scales):
  leaves, treedef = jax.tree.flatten(params)
  kinds = jax.tree.leaves(parts.network.kinds)
  scales = iter(scales)
  return treedef.unflatten(
    [
      next(scales) if kind == "scale" else leaf
      for leaf, kind in zip(leaves, kinds, strict=True)
    ]
  )


def _substep(parts, state, batch, index):
  gradients, stats, loss = _gradients(
    parts, state, state.batch_stats, batch, index
  )
  state = _apply(parts, state, gradients)
  return state._replace(batch_stats=stats), loss


def _alternate_unrolled(parts):
  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    losses = []
    for index in range(len(parts.bits)):
      state, loss = _substep(parts, state, batch, index)
      losses.append(loss)
    return state._replace(step=state.step + 1), jnp.stack(losses)

  return step


def _alternate_sequential(parts):
  @functools.partial(jit, donate_argnums=0)
  def substep(state, batch, index):
    state, loss = _substep(parts, state, batch, index)
    last = index == len(parts.bits) - 1
    return state._replace(step=state.step + last.astype(jnp.int32)), loss

  def step(state, batch):
    losses = []
    for index in range(len(parts.bits)):
      state, loss = substep(state, batch, np.int32(index))
      losses.append(loss)
    return state, jnp.stack(losses)

  step.compiled_per_bits = substep
  step.lower_per_bits = lambda state, batch: substep.lower(
    state, batch, np.int32(0)
  )
  return step


def _finish(parts, state, gradients, stats):
  state = _apply(parts, state, gradients)
  return state._replace(batch_stats=stats, step=state.step + 1)


def _accumulate_unrolled(parts):
  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    summed, stats, losses = None, state.batch_stats, []
    for index in range(len(parts.bits)):
      gradients, stats, loss = _gradients(parts, state, stats, batch, index)
      summed = _add(summed, gradients)
      losses.append(loss)
    return _finish(parts, state, summed, stats), jnp.stack(losses)

  return step


def _accumulate_sequential(parts):
  @functools.partial(jit, donate_argnums=(1, 2))
  def accumulate(state, stats, summed, batch, index):
    gradients, stats, loss = _gradients(parts, state, stats, batch, index)
    return stats, _add(summed, gradients), loss

  @jit
  def zeros(state):
    empty = _only_scales(parts, state.params)
    tree = _Gradients(state.params, empty, empty)
    return jax.tree.map(jnp.zeros_like, tree)

  finish = jit(functools.partial(_finish, parts), donate_argnums=(0, 2))

  def step(state, batch):
    summed, losses = zeros(state), []
    stats = state.batch_stats
    state = state._replace(batch_stats={})
    for index in range(len(parts.bits)):
      stats, summed, loss = accumulate(
        state, stats, summed, batch, np.int32(index)
      )
      losses.append(loss)
    return finish(state, summed, stats), jnp.stack(losses)

  step.compiled_per_bits = accumulate
  step.lower_per_bits = lambda state, batch: accumulate.lower(
    state, state.batch_stats, zeros(state), batch, np.int32(0)
  )
  return step


def _accumulate_vmapped(parts):
  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    indices = jnp.arange(len(parts.bits))
    gradients, stats, losses = jax.vmap(
      lambda index: _gradients(parts, state, state.batch_stats, batch, index)
    )(indices)
    summed = jax.tree.map(lambda g: g.sum(0), gradients)
    # Every bit-width started from the same statistics and changed its own
    # rows; norms shared by all take the mean of the changes.
    stats = jax.tree.map(_merge_statistics, state.batch_stats, stats)
    return _finish(parts, state, summed, stats), losses

  return step


def _merge_statistics(old, new):
  if not jnp.issubdtype(old.dtype, jnp.floating):
    return new[-1]
  changed = new != old[None]
  count = jnp.maximum(changed.sum(0), 1).astype(old.dtype)
  mean = jnp.where(changed, new, 0).sum(0) / count
  return jnp.where(changed.any(0), mean, old)


def _add(summed, gradients):
  if summed is None:
    return gradients
  return jax.tree.map(jnp.add, summed, gradients)
