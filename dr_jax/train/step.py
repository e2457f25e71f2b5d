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

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from dr_jax.nn import Functional
from dr_jax.runtime.compilation import jit
from dr_jax.runtime.sharding import Layout
from dr_jax.train import alrs as alrs_lib
from dr_jax.train import distill as distill_lib
from dr_jax.train import sampling as sampling_lib
from dr_jax.train.gradients import (
  Carry,
  Gradients,
  Parts,
  apply_gradients,
  gradients_of,
  scales_of,
)
from dr_jax.train.state import TrainState, shardings

SCHEDULES = ("alternate", "accumulate")
VECTORIZE = ("auto", "unroll", "sequential", "vmap")

# From `python -m dr_jax.benchmarks.joint_step`. Unrolled gradients that are
# only summed need four times the memory on CPU and gain little or nothing.
_FASTEST = {("cpu", "alternate"): "unroll", ("cpu", "accumulate"): "sequential"}

Batch = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]


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
  sampling: str | sampling_lib.Sampling = "all",
  distillation: str = "none",
  loss_weights: Sequence[float] = (),
  steps: int | None = None,
  layout: Layout | None = None,
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
    layout: where states and batches live; None leaves it to JAX. With more than
      one device along its axis "bits", vectorize must be "vmap".

  Returns:
    step(state, batch) -> (state, losses [visits]), losses unweighted. The
    state's buffers are donated. `batch` has "image" [n, ...] and "label" [n].

  Raises:
    ValueError: for a name, a number of loss weights or a layout that is not
      allowed.
  """
  vectorize = resolve_vectorize(vectorize, schedule)
  if alrs not in alrs_lib.MODES:
    raise ValueError(f"alrs={alrs!r}: allowed are {alrs_lib.MODES}")
  if loss_weights and len(loss_weights) != len(bits):
    raise ValueError(
      f"loss_weights={tuple(loss_weights)}: allowed are {len(bits)} numbers, "
      f"one for each of the bit-widths {bits}"
    )
  parts = Parts(
    network=network,
    bits=bits,
    optimizer=optimizer,
    learning_rate=learning_rate,
    alrs=alrs,
    sampling=sampling_lib.get(sampling),
    distillation=distill_lib.get(distillation),
    weights=np.asarray(loss_weights or (1.0,) * len(bits), np.float32),
    steps=steps,
    layout=layout,
  )
  if layout is not None:
    _check_layout(parts, layout, vectorize)
  build = {
    ("alternate", "unroll"): _alternate_unrolled,
    ("alternate", "sequential"): _alternate_sequential,
    ("accumulate", "unroll"): _accumulate_unrolled,
    ("accumulate", "sequential"): _accumulate_sequential,
    ("accumulate", "vmap"): _accumulate_vmapped,
  }
  return build[schedule, vectorize](parts)


def _check_layout(parts, layout, vectorize):
  scheme = parts.distillation
  if layout.bits > 1:
    if vectorize != "vmap":
      raise ValueError(
        f"devices.bits={layout.bits}: allowed with vectorize={vectorize!r} is "
        "1; spreading bit-widths over devices takes schedule='accumulate' and "
        "vectorize='vmap'"
      )
    if parts.visits % layout.bits:
      raise ValueError(
        f"devices.bits={layout.bits}: allowed are divisors of {parts.visits}, "
        "the bit-widths that a step visits"
      )
    if scheme.exchanges and parts.visits != layout.bits:
      raise ValueError(
        f"devices.bits={layout.bits}: allowed with a distillation are 1 and "
        f"{parts.visits}, one bit-width for each device"
      )
  if layout.norm == "per_device":
    if scheme.init(1):
      raise ValueError(
        "devices.norm='per_device': allowed with a distillation that carries "
        "memory is 'global'"
      )
    if scheme.exchanges and vectorize == "vmap":
      raise ValueError(
        "devices.norm='per_device': allowed with a distillation and "
        "vectorize='vmap' is 'global'"
      )


def _visit(parts, state, carry, batch, index, visit):
  """Forward, backward, update."""
  gradients, carry, loss = gradients_of(
    parts, state, carry, batch, index, visit
  )
  return apply_gradients(parts, state, gradients), carry, loss


def _alternate_unrolled(parts):
  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    losses, carry = [], Carry(state.batch_stats, state.memory, ())
    for visit, index in enumerate(parts.indices(state)):
      state, carry, loss = _visit(parts, state, carry, batch, index, visit)
      losses.append(loss)
    return _end(parts, state, carry), jnp.stack(losses)

  return step


def _alternate_sequential(parts):
  @functools.partial(jit, donate_argnums=0)
  def visit_once(state, batch, visit, teacher=()):
    index = parts.stacked_indices(state)[visit]
    carry = Carry(state.batch_stats, state.memory, teacher)
    state, carry, loss = _visit(parts, state, carry, batch, index, visit)
    ended = _end(parts, state, carry)
    last = visit == parts.visits - 1
    step = jnp.where(last, ended.step, state.step)
    teacher = _kept(parts, Carry({}, {}, carry.teacher)).teacher
    return ended._replace(step=step), teacher, loss

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
    carry = Carry(state.batch_stats, state.memory, ())
    for visit, index in enumerate(parts.indices(state)):
      gradients, carry, loss = gradients_of(
        parts, state, carry, batch, index, visit
      )
      summed = _add(summed, gradients)
      losses.append(loss)
    state = apply_gradients(parts, state, summed)
    return _end(parts, state, carry), jnp.stack(losses)

  return step


def _accumulate_sequential(parts):
  @functools.partial(jit, donate_argnums=(1, 2))
  def accumulate(state, carry, summed, batch, visit):
    index = parts.stacked_indices(state)[visit]
    gradients, carry, loss = gradients_of(
      parts, state, carry, batch, index, visit
    )
    summed = _add(summed, gradients)
    return _kept(parts, carry), _kept(parts, summed), loss

  @jit
  def zeros(state):
    empty = scales_of(parts, state.params)
    tree = Gradients(state.params, empty, empty)
    return _kept(parts, jax.tree.map(jnp.zeros_like, tree))

  @functools.partial(jit, donate_argnums=(0, 2))
  def finish(state, summed, carry):
    return _end(parts, apply_gradients(parts, state, summed), carry)

  teacher_of = _no_answers(parts)

  def step(state, batch):
    summed, losses = zeros(state), []
    teacher = teacher_of(state, batch)
    carry = Carry(state.batch_stats, state.memory, teacher)
    state = state._replace(batch_stats={}, memory={})
    for visit in range(parts.visits):
      carry, summed, loss = accumulate(
        state, carry, summed, batch, np.int32(visit)
      )
      losses.append(loss)
    return finish(state, summed, carry), jnp.stack(losses)

  def lower(state, batch):
    carry = Carry(state.batch_stats, state.memory, teacher_of(state, batch))
    return accumulate.lower(state, carry, zeros(state), batch, np.int32(0))

  step.compiled_per_visit = accumulate
  step.lower_per_visit = lower
  return step


def _accumulate_vmapped(parts):
  def visits(state, carry, batch, indices, numbers):
    gradients, carries, losses = jax.vmap(
      lambda index, visit: gradients_of(
        parts, state, carry, batch, index, visit, axis="visits"
      ),
      axis_name="visits",
    )(indices, numbers)
    return jax.tree.map(lambda g: g.sum(0), gradients), carries, losses

  if parts.layout is not None and parts.layout.bits > 1:
    visits = _over_devices(parts)

  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    carry = Carry(state.batch_stats, state.memory, ())
    summed, carries, losses = visits(
      state,
      carry,
      batch,
      parts.stacked_indices(state),
      jnp.arange(parts.visits),
    )
    # Every bit-width started from the same statistics and changed its own
    # rows; norms shared by all take the mean of the changes.
    stats = jax.tree.map(
      _merge_statistics, state.batch_stats, carries.batch_stats
    )
    memory = jax.tree.map(lambda m: m[0], carries.memory)
    state = apply_gradients(parts, state, summed)
    # Every process reads every loss.
    losses = _kept(parts, losses)
    return _end(parts, state, Carry(stats, memory, ())), losses

  return step


def _over_devices(parts):
  """Every device along the axis "bits" makes its part of the visits."""

  def visits(state, carry, batch, indices, numbers):
    # Varying parameters have gradients of this device, not their sum.
    state, carry = jax.lax.pcast((state, carry), "bits", to="varying")
    summed, ends = None, []
    for index, visit in zip(indices, numbers, strict=True):
      gradients, *end = gradients_of(
        parts, state, carry, batch, index, visit, axis="bits"
      )
      summed = _add(summed, gradients)
      ends.append(end)
    carries, losses = jax.tree.map(lambda *ends: jnp.stack(ends), *ends)
    return jax.lax.psum(summed, "bits"), carries, losses

  return jax.shard_map(
    visits,
    mesh=parts.layout.mesh,
    in_specs=(P(), P(), P(), P("bits"), P("bits")),
    out_specs=(P(), P("bits"), P("bits")),
    axis_names={"bits"},
  )


def _end(parts, state, carry):
  state = state._replace(
    batch_stats=carry.batch_stats, memory=carry.memory, step=state.step + 1
  )
  return _kept(parts, state)


def _kept(parts, tree):
  """Keeps what one call hands to the next where the layout wants it."""
  if parts.layout is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, shardings(parts.layout, tree))


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
    answers = jnp.zeros(logits.shape, jnp.float32)
    return _kept(parts, Carry({}, {}, answers)).teacher

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
