"""One pass of a step: gradients at one assignment of bits, and an update."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from dr_jax.nn import Functional
from dr_jax.quant import SCALE_MAX, SCALE_MIN
from dr_jax.runtime.sharding import Layout
from dr_jax.train import alrs as alrs_lib
from dr_jax.train.distill import Distillation
from dr_jax.train.measured import Measured, logged_of
from dr_jax.train.sampling import Index, Sampling
from dr_jax.train.state import TrainState, replicated


class Parts(NamedTuple):
  """What a step is made of; the fields are arguments of `make_trainer`.

  `bits` has one entry for a float network, which makes one pass a step.
  """

  network: Functional
  bits: tuple[int, ...]
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  alrs: str
  sampling: Sampling
  distillation: Distillation
  weights: np.ndarray
  steps: int | None
  layout: Layout | None = None

  @property
  def passes(self) -> int:
    """Passes of one step."""
    return len(self.sampling.labels(self.bits))

  def indices(self, state: TrainState) -> list[Index]:
    """The bit-widths of this step's passes."""
    key = jax.random.fold_in(state.key, state.step)
    return self.sampling.draw(
      key, len(self.bits), self.network.layers, state.step
    )

  def stacked_indices(self, state: TrainState) -> jax.Array:
    """The same as one int32 array [passes] or [passes, layers]."""
    return jnp.stack([jnp.asarray(i, jnp.int32) for i in self.indices(state)])


class Gradients(NamedTuple):
  """Gradients of one or several passes, summed.

  `weighted` and `total` are sums of factor * |gradient| and of |gradient| for
  the scales: their ratio, the mean ALRS factor, multiplies the update. With
  one bit-width in use it is that bit-width's factor.
  """

  params: Any
  weighted: list[jax.Array]
  total: list[jax.Array]

  def shardings(self, layout: Layout) -> Gradients:
    """Parameters as the layout shards them, the scales' sums replicated."""
    return Gradients(
      layout.shardings(self.params),
      replicated(layout, self.weighted),
      replicated(layout, self.total),
    )


class Carry(NamedTuple):
  """What passes hand to the next: statistics, memory, teacher's logits."""

  batch_stats: Any
  memory: Any
  teacher: Any

  def shardings(self, layout: Layout) -> Carry:
    """The teacher's logits as the batch, all else replicated."""
    return Carry(
      replicated(layout, self.batch_stats),
      replicated(layout, self.memory),
      jax.tree.map(lambda _: layout.batch, self.teacher),
    )


def gradients_of(
  parts: Parts,
  state: TrainState,
  carry: Carry,
  batch: dict[str, jax.Array],
  index: Index,
  number: int | jax.Array,
  *,
  axis: str | None = None,
) -> tuple[Gradients, Carry, Measured]:
  """Returns gradients, the new carry, and what is measured of one pass.

  `number` counts the passes of a step. `axis` names the dimension of
  `jax.vmap` or of the mesh that holds the passes, if they run at once.
  """
  of_batch = jax.value_and_grad(
    functools.partial(_loss, parts, axis), has_aux=True
  )
  if parts.layout is not None and parts.layout.norm == "per_device":
    of_batch = _per_device(parts.layout, of_batch)
  (_, (carry, value)), gradients = of_batch(
    state.params, carry, batch, index, number, _progress(parts, state)
  )
  measured = Measured(value, logged_of(parts.network, gradients))
  return _weighted_by_alrs(parts, state, gradients, index), carry, measured


def _loss(parts, axis, params, carry, batch, index, number, progress):
  """The weighted loss of a pass; and the new carry and the plain loss."""
  logits, stats = parts.network.apply(
    params, carry.batch_stats, index, batch["image"], train=True
  )
  fixed = jax.lax.stop_gradient(logits.astype(jnp.float32))
  memory, teacher = _teacher_logits(parts, carry, batch, fixed, number, axis)
  value = parts.distillation.loss(
    logits, batch["label"], teacher, number, progress, memory
  )
  following = _next_teacher(parts, carry, fixed, number, axis)
  weight = _mean_entry(parts.weights, index)
  return weight * value, (Carry(stats, memory, following), value)


def _weighted_by_alrs(parts, state, gradients, index):
  """Gradients with the ALRS factor of every scale."""
  scales = scales_of(parts, gradients)
  learning_rate = jnp.float32(parts.learning_rate(state.step))
  eta = jnp.asarray(alrs_lib.eta(parts.bits), jnp.float32)
  factor = alrs_lib.factor(
    parts.alrs,
    eta[jnp.asarray(index)],
    alrs_lib.gradient_size(_layer_by_layer(parts, scales)),
    learning_rate,
  )
  # A scale learns at the pace of its own layer's bit-width.
  factors = jnp.broadcast_to(factor, (parts.network.layers,))
  total = jax.tree.map(jnp.abs, scales)
  units = [
    alrs_lib.unit(parts.alrs, scale) for scale in scales_of(parts, state.params)
  ]
  weighted = [
    _per_layer(factors[layers], size) * unit * size
    for layers, unit, size in zip(
      parts.network.scale_layers, units, total, strict=True
    )
  ]
  return Gradients(gradients, weighted, total)


def _layer_by_layer(parts, scales):
  """The scales of every layer, those of a stack one by one."""
  return [
    own
    for layers, scale in zip(parts.network.scale_layers, scales, strict=True)
    for own in scale.reshape(layers.size, -1)
  ]


def _per_layer(factors, scales):
  """Factors of a layer or a stack of them, as wide as its scales."""
  return factors.reshape(factors.shape + (1,) * (scales.ndim - factors.ndim))


def _per_device(layout, of_batch):
  """Makes every device see its shard of the batch alone; means over devices."""

  def local(params, carry, batch, index, number, progress):
    # Varying parameters have gradients of this device, not their sum.
    params = jax.lax.pcast(params, "data", to="varying")
    (loss, (carry, value)), gradients = of_batch(
      params, carry, batch, index, number, progress
    )
    loss, stats, value, gradients = mean_over_devices(
      (loss, carry.batch_stats, value, gradients)
    )
    return (loss, (carry._replace(batch_stats=stats), value)), gradients

  carries = Carry(P(), P(), P("data"))
  outer = jax.sharding.get_abstract_mesh()
  return jax.shard_map(
    local,
    mesh=layout.mesh if outer.empty else outer,
    in_specs=(P(), carries, P("data"), P(), P(), P()),
    out_specs=((P(), (carries, P())), P()),
    axis_names={"data"},
  )


def mean_over_devices(tree: Any) -> Any:
  """Means over the axis "data" of a `jax.shard_map`; integers stay as they are.

  On CPUs all arrays of a type are added up as one: processes send each array on
  its own, even of one operation, and that takes milliseconds however small it
  is. Elsewhere the compiler joins sums, and can start before it has them all.
  """
  leaves, treedef = jax.tree.flatten(tree)
  groups: dict[Any, list[int]] = {}
  for number, leaf in enumerate(leaves):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      joined = jax.default_backend() == "cpu"
      groups.setdefault(leaf.dtype if joined else number, []).append(number)
  for numbers in groups.values():
    flat, split = ravel_pytree([leaves[number] for number in numbers])
    means = split(jax.lax.pmean(flat, "data"))
    for number, mean in zip(numbers, means, strict=True):
      leaves[number] = mean
  return treedef.unflatten(leaves)


def _teacher_logits(parts, carry, batch, logits, number, axis):
  """The memory and the teacher's logits for the loss of a pass."""
  scheme, labels = parts.distillation, batch["label"]
  if axis is not None:
    if not parts.distillation.exchanges:
      return carry.memory, jnp.zeros_like(logits)
    # A gather, but as a sum: its result is the same on every device.
    shape = (-1, *(1,) * logits.ndim)
    mine = jnp.arange(parts.passes).reshape(shape) == number
    every = jax.lax.psum(jnp.where(mine, logits, 0), axis)
    memory = scheme.learn(carry.memory, every[0], labels)
    teacher = 0 if scheme.teacher == "first" else jnp.maximum(number - 1, 0)
    return memory, every[teacher]
  learned = scheme.learn(carry.memory, logits, labels)
  memory = jax.tree.map(
    lambda new, old: jnp.where(number == 0, new, old), learned, carry.memory
  )
  return memory, carry.teacher


def _next_teacher(parts, carry, logits, number, axis):
  """The teacher's logits for the next pass, if there is one."""
  teacher = parts.distillation.teacher
  if teacher is None or axis is not None:
    return ()
  if teacher == "previous":
    return logits
  if isinstance(number, int):
    return carry.teacher if number else logits
  return jnp.where(number == 0, logits, carry.teacher)


def _progress(parts, state):
  """The fraction of the run that is done with this step, in (0, 1]."""
  if parts.steps is None:
    return jnp.float32(1)
  return (state.step + 1).astype(jnp.float32) / parts.steps


def _mean_entry(table, index):
  """The entry of a table of bit-widths; the mean where layers differ."""
  return jnp.asarray(table)[jnp.asarray(index)].mean()


def apply_gradients(
  parts: Parts, state: TrainState, gradients: Gradients
) -> TrainState:
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
      scales_of(parts, tree) for tree in (state.params, directions)
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


def scales_of(parts: Parts, tree: Any) -> list[Any]:
  """The leaves that are learned scales, as a flat list."""
  labels = jax.tree.leaves(parts.network.param_labels)
  pairs = zip(jax.tree.leaves(tree), labels, strict=True)
  return [leaf for leaf, label in pairs if label == "scale"]


def _replace_scales(parts, params, scales):
  leaves, treedef = jax.tree.flatten(params)
  labels = jax.tree.leaves(parts.network.param_labels)
  scales = iter(scales)
  return treedef.unflatten(
    [
      next(scales) if label == "scale" else leaf
      for leaf, label in zip(leaves, labels, strict=True)
    ]
  )
