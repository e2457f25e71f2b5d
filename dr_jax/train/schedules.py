"""How the passes of a training step become programs.

A schedule says when parameters are updated, a mode how many programs there are:

  alternate   for each pass: forward, backward, update (arXiv 2502.01199,
              algorithm A.2, with sampling "all").
  accumulate  gradients of all passes summed, one update (AdaBits,
              Any-Precision).

  unroll      one program holds all passes; constants of each bit-width fold.
  sequential  one program for any pass, called once per pass: compiles once,
              needs the memory of one.
  vmap        passes as a batch dimension (accumulate only), which a mesh can
              spread over devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from dr_jax.runtime.compilation import jit
from dr_jax.runtime.order import after
from dr_jax.runtime.tree import stack
from dr_jax.train.gradients import (
  Carry,
  Gradients,
  Parts,
  apply_gradients,
  gradients_of,
  scales_of,
)
from dr_jax.train.state import TrainState

SCHEDULES = ("alternate", "accumulate")
VECTORIZE = ("auto", "unroll", "sequential", "vmap")

# Quantized layers times passes of a step up to which "auto" unrolls: ResNet20
# at four bit-widths has 80, ResNet50 208. Each is compiled apart, in 0.4 to 0.5
# CPU seconds for a CPU (`python -m dr_jax.benchmarks.compile_time`) and longer
# for a GPU: for an H100, ResNet50 unrolled had not compiled after 170 s.
MOST_UNROLLED = 128

Batch = dict[str, Any]
Step = Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]
LoggedStep = Callable[
  [TrainState, Batch], tuple[TrainState, jax.Array, dict[str, jax.Array]]
]


class Compiled(NamedTuple):
  """A step and its main program.

  Attributes:
    step: `step(state, batch) -> (state, losses [passes], logged)`, with
      `logged` {name in metrics.jsonl: [passes]}.
    program: the jitted function that does most of the work: the step itself,
      or one pass of it where passes run one after the other.
    lower: `lower(state, batch) -> jax.stages.Lowered` of that program.
  """

  step: LoggedStep
  program: Callable[..., Any]
  lower: Callable[[TrainState, Batch], jax.stages.Lowered]


def check_vectorize(vectorize: str, schedule: str) -> None:
  """Checks names of a mode and of a schedule.

  Raises:
    ValueError: for unknown names, or "vmap" with the alternate schedule, whose
      updates depend on each other.

  >>> check_vectorize("vmap", "alternate")
  Traceback (most recent call last):
  ValueError: vectorize must not be 'vmap' with schedule='alternate': ...
  """
  if schedule not in SCHEDULES:
    raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
  if vectorize not in VECTORIZE:
    raise ValueError(f"vectorize must be one of {VECTORIZE}, got {vectorize!r}")
  if vectorize == "vmap" and schedule == "alternate":
    raise ValueError(
      "vectorize must not be 'vmap' with schedule='alternate': bit-widths that "
      "update one after the other cannot be a batch dimension"
    )


def resolve_vectorize(
  vectorize: str, schedule: str, *, layers: int, passes: int
) -> str:
  """Returns the mode that "auto" stands for on this backend.

  Small networks unroll, which saves launches and folds constants. Large ones
  would compile for minutes: their passes take turns in one program. So do
  gradients that are only summed on CPU, where unrolled ones gain little or
  nothing.

  Args:
    vectorize: "auto", or a mode, which stands for itself.
    schedule: "alternate" or "accumulate".
    layers: quantized layers of the network; 0 for a float one.
    passes: of a step.

  Raises:
    ValueError: as `check_vectorize`.

  >>> resolve_vectorize("auto", "alternate", layers=20, passes=4)
  'unroll'
  >>> resolve_vectorize("auto", "alternate", layers=52, passes=4)
  'sequential'
  >>> resolve_vectorize("unroll", "alternate", layers=52, passes=4)
  'unroll'
  """
  check_vectorize(vectorize, schedule)
  if vectorize != "auto":
    return vectorize
  summed_on_cpu = schedule == "accumulate" and jax.default_backend() == "cpu"
  large = layers * passes > MOST_UNROLLED
  return "sequential" if large or summed_on_cpu else "unroll"


def passes_at_once(vectorize: str, passes: int) -> int:
  """Returns of how many passes a step keeps activations at the same time.

  >>> passes_at_once("unroll", 4)
  1
  >>> passes_at_once("vmap", 4)
  4
  """
  return passes if vectorize == "vmap" else 1


def compile_step(parts: Parts, schedule: str, vectorize: str) -> Compiled:
  """Builds the step of a schedule in a mode that is not "auto"."""
  build = {
    ("alternate", "unroll"): _alternate_unrolled,
    ("alternate", "sequential"): _alternate_sequential,
    ("accumulate", "unroll"): _accumulate_unrolled,
    ("accumulate", "sequential"): _accumulate_sequential,
    ("accumulate", "vmap"): _accumulate_vmapped,
  }
  return build[schedule, vectorize](parts)


def _one_pass(parts, state, carry, batch, index, number):
  """Forward, backward, update."""
  gradients, carry, measured = gradients_of(
    parts, state, carry, batch, index, number
  )
  return apply_gradients(parts, state, gradients), carry, measured


def _alternate_unrolled(parts):
  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    passes, carry = [], Carry(state.batch_stats, state.memory, ())
    for number, index in enumerate(parts.indices(state)):
      state, carry, measured = _one_pass(
        parts, state, carry, batch, index, number
      )
      passes.append(measured)
    return _end(parts, state, carry), *stack(passes)

  return Compiled(step, step, step.lower)


def _alternate_sequential(parts):
  @functools.partial(jit, donate_argnums=0)
  def run_pass(state, batch, number, teacher=()):
    index = parts.stacked_indices(state)[number]
    carry = Carry(state.batch_stats, state.memory, teacher)
    state, carry, measured = _one_pass(
      parts, state, carry, batch, index, number
    )
    ended = _end(parts, state, carry)
    last = number == parts.passes - 1
    step = jnp.where(last, ended.step, state.step)
    teacher = _constrain_teacher(parts, carry.teacher)
    return ended._replace(step=step), teacher, measured

  teacher_of = _initial_teacher_logits(parts)

  def step(state, batch):
    passes, teacher = [], teacher_of(state, batch)
    for number in range(parts.passes):
      state, teacher, measured = run_pass(
        state, batch, np.int32(number), teacher
      )
      passes.append(measured)
    return state, *_stack(passes)

  def lower(state, batch):
    teacher = teacher_of(state, batch)
    return run_pass.lower(state, batch, np.int32(0), teacher)

  return Compiled(step, run_pass, lower)


def _accumulate_unrolled(parts):
  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    summed: Any = None
    passes, carry = [], Carry(state.batch_stats, state.memory, ())
    for number, index in enumerate(parts.indices(state)):
      gradients, carry, measured = gradients_of(
        parts, state, carry, _after(batch, summed), index, number
      )
      summed = _add(summed, gradients)
      passes.append(measured)
    state = apply_gradients(parts, state, summed)
    return _end(parts, state, carry), *stack(passes)

  return Compiled(step, step, step.lower)


def _accumulate_sequential(parts):
  @functools.partial(jit, donate_argnums=(1, 2))
  def accumulate(state, carry, summed, batch, number):
    index = parts.stacked_indices(state)[number]
    gradients, carry, measured = gradients_of(
      parts, state, carry, batch, index, number
    )
    summed = _add(summed, gradients)
    return _constrain(parts, carry), _constrain(parts, summed), measured

  @jit
  def zeros(state):
    empty = scales_of(parts, state.params)
    tree = Gradients(state.params, empty, empty)
    return _constrain(parts, jax.tree.map(jnp.zeros_like, tree))

  @functools.partial(jit, donate_argnums=(0, 2))
  def finish(state, summed, carry):
    return _end(parts, apply_gradients(parts, state, summed), carry)

  teacher_of = _initial_teacher_logits(parts)

  def begin(state, batch):
    """What the first pass takes; statistics and memory are in the carry."""
    summed, teacher = zeros(state), teacher_of(state, batch)
    carry = Carry(state.batch_stats, state.memory, teacher)
    return state._replace(batch_stats={}, memory={}), carry, summed

  def step(state, batch):
    passes = []
    state, carry, summed = begin(state, batch)
    for number in range(parts.passes):
      carry, summed, measured = accumulate(
        state, carry, summed, batch, np.int32(number)
      )
      passes.append(measured)
    return finish(state, summed, carry), *_stack(passes)

  def lower(state, batch):
    return accumulate.lower(*begin(state, batch), batch, np.int32(0))

  return Compiled(step, accumulate, lower)


def _accumulate_vmapped(parts):
  def passes(state, carry, batch, indices, numbers):
    gradients, carries, measured = jax.vmap(
      lambda index, number: gradients_of(
        parts, state, carry, batch, index, number, axis="passes"
      ),
      axis_name="passes",
    )(indices, numbers)
    return jax.tree.map(lambda g: g.sum(0), gradients), carries, measured

  if parts.layout is not None and parts.layout.bits > 1:
    passes = _over_devices(parts)

  @functools.partial(jit, donate_argnums=0)
  def step(state, batch):
    carry = Carry(state.batch_stats, state.memory, ())
    summed, carries, measured = passes(
      state,
      carry,
      batch,
      parts.stacked_indices(state),
      jnp.arange(parts.passes),
    )
    # Every bit-width started from the same statistics and changed its own
    # rows; norms shared by all take the mean of the changes.
    stats = jax.tree.map(
      _merge_statistics, state.batch_stats, carries.batch_stats
    )
    memory = jax.tree.map(lambda m: m[0], carries.memory)
    state = apply_gradients(parts, state, summed)
    if parts.layout is not None:
      # Every process reads every loss.
      measured = jax.lax.with_sharding_constraint(
        measured, parts.layout.replicated
      )
    return _end(parts, state, Carry(stats, memory, ())), *measured

  return Compiled(step, step, step.lower)


def _over_devices(parts):
  """Every device along the axis "bits" makes its part of the passes."""

  def passes(state, carry, batch, indices, numbers):
    # Varying parameters have gradients of this device, not their sum.
    state, carry = jax.lax.pcast((state, carry), "bits", to="varying")
    summed, ends = None, []
    for index, number in zip(indices, numbers, strict=True):
      gradients, *end = gradients_of(
        parts, state, carry, batch, index, number, axis="bits"
      )
      summed = _add(summed, gradients)
      ends.append(end)
    carries, measured = stack(ends)
    return jax.lax.psum(summed, "bits"), carries, measured

  return jax.shard_map(
    passes,
    mesh=parts.layout.mesh,
    in_specs=(P(), P(), P(), P("bits"), P("bits")),
    out_specs=(P(), P("bits"), P("bits")),
    axis_names={"bits"},
  )


_stack: Callable[[list[Any]], Any] = jax.jit(stack)


def _end(parts, state, carry):
  state = state._replace(
    batch_stats=carry.batch_stats, memory=carry.memory, step=state.step + 1
  )
  return _constrain(parts, state)


def _constrain(parts, tree):
  """Keeps what one program hands to the next in the layout's shardings."""
  if parts.layout is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, tree.shardings(parts.layout))


def _constrain_teacher(parts, logits):
  """Keeps the logits of a teacher, if there are any, with their images."""
  if parts.layout is None:
    return logits
  shardings = jax.tree.map(lambda _: parts.layout.batch, logits)
  return jax.lax.with_sharding_constraint(logits, shardings)


def _initial_teacher_logits(parts):
  """Builds the teacher's logits before the first pass: zeros, or nothing."""
  if parts.distillation.teacher is None:
    return lambda state, batch: ()

  @jit
  def zeros(state, batch):
    index = jnp.int32(0)
    shape, _ = jax.eval_shape(
      functools.partial(parts.network.apply, train=True),
      *(state.params, state.batch_stats, index, batch["image"]),
    )
    logits = jnp.zeros(shape.shape, jnp.float32)
    return _constrain_teacher(parts, logits)

  return zeros


def _merge_statistics(old, new):
  if not jnp.issubdtype(old.dtype, jnp.floating):
    return new[-1]
  changed = new != old[None]
  count = jnp.maximum(changed.sum(0), 1).astype(old.dtype)
  mean = jnp.where(changed, new, 0).sum(0) / count
  return jnp.where(changed.any(0), mean, old)


def _after(batch, summed):
  """The batch, for a pass that comes after those whose gradients are summed.

  Else XLA runs all forward passes before the first backward pass.
  """
  if summed is None:
    return batch
  total = jnp.asarray(optax.tree.sum(summed.params))
  return batch | {"image": after(batch["image"], total)}


def _add(summed, gradients):
  if summed is None:
    return gradients
  return jax.tree.map(jnp.add, summed, gradients)
