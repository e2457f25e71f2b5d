"""A network, its optimizer and its training step, as one pair of functions.

As in optax, `init` makes a state and `step` takes it on; both come from the
same arguments, so that they cannot disagree. A step makes several passes
(`train.sampling`), each at one assignment of bits and with its own loss
(`train.distill`); `train.schedules` says how they become programs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dr_jax.nn import Functional
from dr_jax.runtime.sharding import Layout
from dr_jax.train import alrs as alrs_lib
from dr_jax.train import calls
from dr_jax.train import distill as distill_lib
from dr_jax.train import sampling as sampling_lib
from dr_jax.train.gradients import Parts
from dr_jax.train.schedules import (
  Batch,
  LoggedStep,
  Step,
  compile_step,
  resolve_vectorize,
)
from dr_jax.train.state import TrainState, shard_state

Label = int | str | None


class Trainer(NamedTuple):
  """How a network trains.

  Attributes:
    init: `init(key) -> state` at step 0, with its own copies of all arrays, on
      the devices of the layout if there is one (then every process must call
      it, and gets the first one's arrays).
    step: `step(state, batch) -> (state, losses [passes])`, losses unweighted.
      The state's buffers are donated. `batch` has "image" [n, ...] and "label"
      [n].
    logged_step: the same, `-> (state, losses, logged)`, with numbers of every
      pass by their names in metrics.jsonl; see `train.measured`. With a tuple
      of batches it makes as many steps, and returns [steps, passes] of each;
      in one call of a program, but where vectorize is "sequential".
    labels: what each pass trains: a bit-width, a word where it is drawn, None
      for a float network.
    program, lower: see `schedules.Compiled`.
  """

  init: Callable[[jax.Array], TrainState]
  step: Step
  logged_step: LoggedStep
  labels: tuple[Label, ...]
  program: Callable[..., Any]
  lower: Callable[[TrainState, Batch], jax.stages.Lowered]


def make_trainer(
  network: Functional,
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
  num_classes: int = 0,
) -> Trainer:
  """Builds what trains a network at all of its bit-widths.

  Args:
    network: `nn.functional(model)`, quantized or float.
    optimizer: from `make_optimizer`.
    learning_rate: step -> learning rate.
    schedule: "alternate" or "accumulate".
    vectorize: "unroll", "sequential", "vmap", or "auto", which goes by the size
      of the network; see `resolve_vectorize`.
    alrs: how scales learn at each bit-width; see `train.alrs`.
    sampling: the bit-widths of a step's passes; see `train.sampling`.
    distillation: what each pass learns from; see `train.distill`.
    loss_weights: one factor per bit-width for its loss and so its gradient,
      or none; a pass that mixes bit-widths takes the mean of its layers'.
    steps: length of the run, for schemes that change along it.
    layout: where states and batches live; None leaves it to JAX. With more than
      one device along its axis "bits", vectorize must be "vmap".
    num_classes: width of the logits, which some distillation schemes carry
      memory for.

  Raises:
    ValueError: for an unknown name, or a number of loss weights or a layout
      that does not fit.

  >>> import optax
  >>> from flax import nnx
  >>> from dr_jax import nn, quant
  >>> from dr_jax.train import make_optimizer
  >>> rngs = nnx.Rngs(0)
  >>> layers = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
  >>> images, labels = jnp.eye(4), jnp.array([0, 1, 0, 1])
  >>> network = nn.functional(
  ...   nn.quantize(
  ...     nnx.Sequential(*layers),
  ...     weight=quant.double_rounding((8, 4)),
  ...     sample=images,
  ...     skip=(),
  ...   )
  ... )
  >>> optimizer = make_optimizer("adam", param_labels=network.param_labels)
  >>> trainer = make_trainer(
  ...   network, optimizer, optax.constant_schedule(0.1), alrs="relative"
  ... )
  >>> state = trainer.init(jax.random.key(0))
  >>> batch = {"image": images, "label": labels}
  >>> for _ in range(50):
  ...   state, losses = trainer.step(state, batch)
  >>> trainer.labels, losses.shape, bool((losses < 0.1).all())
  ((8, 4), (2,), True)
  """
  if alrs not in alrs_lib.MODES:
    raise ValueError(f"alrs must be one of {alrs_lib.MODES}, got {alrs!r}")
  # A float network makes one pass, at no bit-width.
  bits = network.bits or (32,)
  if loss_weights and len(loss_weights) != len(bits):
    raise ValueError(
      f"loss_weights must be {len(bits)} numbers, one for each of the "
      f"bit-widths {bits}, got {tuple(loss_weights)}"
    )
  scheme = distill_lib.get(distillation)
  parts = Parts(
    network=network,
    bits=bits,
    optimizer=optimizer,
    learning_rate=learning_rate,
    alrs=alrs,
    sampling=sampling_lib.get(sampling),
    distillation=scheme,
    weights=np.asarray(loss_weights or (1.0,) * len(bits), np.float32),
    steps=steps,
    layout=layout,
  )
  vectorize = resolve_vectorize(
    vectorize, schedule, layers=network.layers, passes=parts.passes
  )
  if layout is not None:
    _check_layout(parts, layout, vectorize)

  def init(key):
    params, batch_stats = jax.tree.map(
      jnp.copy, (network.params, network.batch_stats)
    )
    state = TrainState(
      step=jnp.int32(0),
      params=params,
      opt_state=optimizer.init(params),
      batch_stats=batch_stats,
      key=key,
      memory=scheme.init(num_classes),
    )
    return state if layout is None else shard_state(layout, state)

  one_step, program, lower = compile_step(parts, schedule, vectorize)
  if vectorize == "sequential":
    several_steps = calls.one_by_one(one_step)
  else:
    # The function itself: a compiler's options are for the outermost program.
    several_steps = calls.in_one_call(inspect.unwrap(program))

  def logged_step(state, batch):
    steps = several_steps if isinstance(batch, tuple) else one_step
    return steps(state, batch)

  def step(state, batch):
    state, losses, _ = logged_step(state, batch)
    return state, losses

  labels = pass_labels(network.bits, parts.sampling)
  return Trainer(init, step, logged_step, labels, program, lower)


def pass_labels(
  bits: tuple[int, ...], sampling: sampling_lib.Sampling
) -> tuple[Label, ...]:
  """What each pass of a step trains; `bits` is empty for a float network.

  >>> pass_labels((8, 6, 4, 2), sampling_lib.get("sandwich"))
  (8, 'random', 2)
  """
  return sampling.labels(bits) if bits else (None,)


def _check_layout(parts, layout, vectorize):
  scheme = parts.distillation
  if layout.bits > 1:
    if vectorize != "vmap":
      raise ValueError(
        f"bits must be 1 device with vectorize={vectorize!r}, got "
        f"{layout.bits}: spreading bit-widths over devices takes "
        "schedule='accumulate' and vectorize='vmap'"
      )
    if parts.passes % layout.bits:
      raise ValueError(
        f"bits must be a divisor of {parts.passes}, the passes of a step, got "
        f"{layout.bits} devices"
      )
    if scheme.exchanges and parts.passes != layout.bits:
      raise ValueError(
        f"bits must be 1 or {parts.passes} devices with a distillation, one "
        f"for each bit-width, got {layout.bits}"
      )
  if layout.norm == "per_device":
    if scheme.init(1):
      raise ValueError(
        "norm must be 'global' with a distillation that carries memory, got "
        "'per_device'"
      )
    if scheme.exchanges and vectorize == "vmap":
      raise ValueError(
        "norm must be 'global' with a distillation and vectorize='vmap', got "
        "'per_device'"
      )
