"""One training step of a network at several bit-widths.

A step visits bit-widths (`train.sampling`), each with a loss of its own
(`train.distill`). Schedules:
  alternate   for each visit: forward, backward, update (arXiv 2502.01199,
              algorithm A.2, with sampling "all").
  accumulate  gradients of all visits summed, one update (AdaBits,
              Any-Precision).
How the visits become programs:
  unroll      one program holds all of them; constants of each bit-width fold.
  sequential  one program for any of them, called once per visit: compiles
              once, needs the memory of one.
  vmap        visits as a batch dimension (accumulate only), which a mesh can
              spread over devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dr_jax.compilation import jit
from dr_jax.nn import Functional
from dr_jax.quant import SCALE_MAX, SCALE_MIN
from dr_jax.train import alrs as alrs_lib
from dr_jax.train import distill as distill_lib
from dr_jax.train import sampling as sampling_lib

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
    memory: what a distillation scheme carries from step to step.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  batch_stats: Any
  key: jax.Array
  memory: Any


def init_state(
  network: Functional,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  *,
  distillation: str = "none",
  num_classes: int = 0,
) -> TrainState:
  """Returns the state at step 0, with its own copies of all arrays.

  Args:
    network, optimizer: as for `make_step`.
    key: PRNG key of the run.
    distillation: as for `make_step`.
    num_classes: width of the logits, which some schemes carry memory for.
  """
  params, batch_stats = jax.tree.map(
    jnp.copy, (network.params, network.batch_stats)
  )
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    batch_stats=batch_stats,
    key=key,
    memory=distill_lib.get(distillation).init(num_classes),
  )


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
  sampling: str = "all",
  distillation: str = "none",
  loss_weights: Sequence[float] = (),
  steps: int | None = None,
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
    sampling: which bit-widths a step visits; see `train.sampling`.
    distillation: what each visit learns from; see `train.distill`.
    loss_weights: one factor per bit-width for its loss and so its gradient,
      or none; a visit that mixes bit-widths takes the mean of its layers'.
    steps: length of the run, for schemes that change along it.

  Returns:
    step(state, batch) -> (state, losses [visits]), losses unweighted. The
    state's buffers are donated. `batch` has "image" [n, ...] and "label" [n].

  Raises:
    ValueError: for a name or a number of loss weights that is not allowed.
  """
  vectorize = resolve_vectorize(vectorize, schedule)
  if alrs not in alrs_lib.MODES:
    raise ValueError(f"alrs={alrs!r}: allowed are {alrs_lib.MODES}")
  if loss_weights and len(loss_weights) != len(bits):
    raise ValueError(
      f"loss_weights={tuple(loss_weights)}: allowed are {len(bits)} numbers, "
      f"one for each of the bit-widths {bits}"
    )
  parts = _Parts(
    network=network,
    bits=bits,
    optimizer=optimizer,
    learning_rate=learning_rate,
    alrs=alrs,
    sampling=sampling_lib.get(sampling),
    distillation=distill_lib.get(distillation),
    weights=np.asarray(loss_weights or (1.0,) * len(bits), np.float32),
    steps=steps,
  )
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
  sampling: sampling_lib.Sampling
  distillation: distill_lib.Distillation
  weights: np.ndarray
  steps: int | None

  @property
  def visits(self) -> int:
    return len(self.sampling.labels(self.bits))

  def indices(self, state: TrainState) -> list[sampling_lib.Index]:
    """The bit-widths that this step visits."""
    key = jax.random.fold_in(state.key, state.step)
    return self.sampling.draw(key, len(self.bits), self.network.layers)

  def stacked_indices(self, state: TrainState) -> jax.Array:
    """The same as one int32 array [visits] or [visits, layers]."""
    return jnp.stack([jnp.asarray(i, jnp.int32) for i in self.indices(state)])


class _Gradients(NamedTuple):
  """Gradients of one or several visits, summed.

  `weighted` and `total` are sums of factor * |gradient| and of |gradient| for
  the scales: their ratio, the mean ALRS factor, multiplies the update. With
  one bit-width in use it is that bit-width's factor.
  """

  params: Any
  weighted: Any
  total: Any


class _Carry(NamedTuple):
  """What the visits of a step hand on: statistics, memory, teacher's logits."""

  batch_stats: Any
  memory: Any
  teacher: Any


def _gradients(parts, state, carry, batch, index, visit, *, axis=None):
  """Returns gradients, the new carry, and the loss of one visit.

  `axis` names the batch dimension that holds the visits, if they run at once.
  """
  weight = _at(parts.weights, index)

  def loss(params):
    logits, stats = parts.network.apply(
      params, carry.batch_stats, index, batch["image"], train=True
    )
    answers = jax.lax.stop_gradient(logits.astype(jnp.float32))
    memory, teacher = _taught(parts, carry, batch, answers, visit, axis)
    value = parts.distillation.loss(
      logits, batch["label"], teacher, visit, _progress(parts, state), memory
    )
    handed = _handed(parts, carry, answers, visit, axis)
    return weight * value, (_Carry(stats, memory, handed), value)

  (_, (carry, value)), gradients = jax.value_and_grad(loss, has_aux=True)(
    state.params
  )
  scales = _only_scales(parts, gradients)
  learning_rate = jnp.float32(parts.learning_rate(state.step))
  factor = alrs_lib.factor(
    parts.alrs,
    _at(np.asarray(alrs_lib.eta(parts.bits), np.float32), index),
    alrs_lib.gradient_size(scales),
    learning_rate,
  )
  total = jax.tree.map(jnp.abs, scales)
  weighted = jax.tree.map(lambda size: factor * size, total)
  return _Gradients(gradients, weighted, total), carry, value


def _taught(parts, carry, batch, answers, visit, axis):
  """The memory and the teacher's logits that a visit's loss is given."""
  scheme, labels = parts.distillation, batch["label"]
  if axis is not None:
    every = jax.lax.all_gather(answers, axis)
    memory = scheme.learn(carry.memory, every[0], labels)
    teacher = 0 if scheme.teacher == "first" else jnp.maximum(visit - 1, 0)
    return memory, every[teacher]
  learned = scheme.learn(carry.memory, answers, labels)
  memory = jax.tree.map(
    lambda new, old: jnp.where(visit == 0, new, old), learned, carry.memory
  )
  return memory, carry.teacher


def _handed(parts, carry, answers, visit, axis):
  """The teacher's logits for the next visit, if there is one."""
  teacher = parts.distillation.teacher
  if teacher is None or axis is not None:
    return ()
  if teacher == "previous":
    return answers
  if isinstance(visit, int):
    return carry.teacher if visit else answers
  return jnp.where(visit == 0, answers, carry.teacher)


def _progress(parts, state):
  """How much of the run is done with this step, in (0, 1]."""
  if parts.steps is None:
    return jnp.float32(1)
  return (state.step + 1).astype(jnp.float32) / parts.steps


def _at(table, index):
  """The entry of a table of bit-widths; the mean where layers differ."""
  return jnp.asarray(table)[jnp.asarray(index)].mean()


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


def _visit(parts, state, carry, batch, index, visit):
  """Forward, backward, update."""
  gradients, carry, loss = _gradients(parts, state, carry, batch, index, visit)
  return _apply(parts, state, gradients), carry, loss


def _alternate_unrolled(parts):
  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    losses, carry = [], _Carry(state.batch_stats, state.memory, ())
    for visit, index in enumerate(parts.indices(state)):
      state, carry, loss = _visit(parts, state, carry, batch, index, visit)
      losses.append(loss)
    return _end(state, carry), jnp.stack(losses)

  return step


def _alternate_sequential(parts):
  @functools.partial(jit, donate_argnums=0)
  def visit_once(state, batch, visit, teacher=()):
    index = parts.stacked_indices(state)[visit]
    carry = _Carry(state.batch_stats, state.memory, teacher)
    state, carry, loss = _visit(parts, state, carry, batch, index, visit)
    ended = _end(state, carry)
    last = visit == parts.visits - 1
    step = jnp.where(last, ended.step, state.step)
    return ended._replace(step=step), carry.teacher, loss

  teacher_of = _no_answers(parts)

  def step(state, batch):
    losses, teacher = [], teacher_of(state, batch)
    for visit in range(parts.visits):
      state, teacher, loss = visit_once(state, batch, np.int32(visit), teacher)
      losses.append(loss)
    return state, jnp.stack(losses)

  step.compiled_per_visit = visit_once
  step.lower_per_visit = lambda state, batch: visit_once.lower(
    state, batch, np.int32(0), teacher_of(state, batch)
  )
  return step


def _accumulate_unrolled(parts):
  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    summed, losses = None, []
    carry = _Carry(state.batch_stats, state.memory, ())
    for visit, index in enumerate(parts.indices(state)):
      gradients, carry, loss = _gradients(
        parts, state, carry, batch, index, visit
      )
      summed = _add(summed, gradients)
      losses.append(loss)
    return _end(_apply(parts, state, summed), carry), jnp.stack(losses)

  return step


def _accumulate_sequential(parts):
  @functools.partial(jit, donate_argnums=(1, 2))
  def accumulate(state, carry, summed, batch, visit):
    index = parts.stacked_indices(state)[visit]
    gradients, carry, loss = _gradients(
      parts, state, carry, batch, index, visit
    )
    return carry, _add(summed, gradients), loss

  @jit
  def zeros(state):
    empty = _only_scales(parts, state.params)
    tree = _Gradients(state.params, empty, empty)
    return jax.tree.map(jnp.zeros_like, tree)

  @functools.partial(jit, donate_argnums=(0, 2))
  def finish(state, summed, carry):
    return _end(_apply(parts, state, summed), carry)

  teacher_of = _no_answers(parts)

  def step(state, batch):
    summed, losses = zeros(state), []
    teacher = teacher_of(state, batch)
    carry = _Carry(state.batch_stats, state.memory, teacher)
    state = state._replace(batch_stats={}, memory={})
    for visit in range(parts.visits):
      carry, summed, loss = accumulate(
        state, carry, summed, batch, np.int32(visit)
      )
      losses.append(loss)
    return finish(state, summed, carry), jnp.stack(losses)

  def lower(state, batch):
    carry = _Carry(state.batch_stats, state.memory, teacher_of(state, batch))
    return accumulate.lower(state, carry, zeros(state), batch, np.int32(0))

  step.compiled_per_visit = accumulate
  step.lower_per_visit = lower
  return step


def _accumulate_vmapped(parts):
  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    carry = _Carry(state.batch_stats, state.memory, ())
    gradients, carries, losses = jax.vmap(
      lambda index, visit: _gradients(
        parts, state, carry, batch, index, visit, axis="visits"
      ),
      axis_name="visits",
    )(parts.stacked_indices(state), jnp.arange(parts.visits))
    summed = jax.tree.map(lambda g: g.sum(0), gradients)
    # Every bit-width started from the same statistics and changed its own
    # rows; norms shared by all take the mean of the changes.
    stats = jax.tree.map(
      _merge_statistics, state.batch_stats, carries.batch_stats
    )
    memory = jax.tree.map(lambda m: m[0], carries.memory)
    state = _apply(parts, state, summed)
    return _end(state, _Carry(stats, memory, ())), losses

  return step


def _end(state, carry):
  return state._replace(
    batch_stats=carry.batch_stats, memory=carry.memory, step=state.step + 1
  )


def _no_answers(parts):
  """Builds the teacher's logits before the first visit: zeros, or nothing."""
  if parts.distillation.teacher is None:
    return lambda state, batch: ()

  @jit
  def zeros(state, batch):
    index = jnp.int32(0)
    logits, _ = jax.eval_shape(
      functools.partial(parts.network.apply, train=True),
      *(state.params, state.batch_stats, index, batch["image"]),
    )
    return jnp.zeros(logits.shape, jnp.float32)

  return zeros


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
