"""One phase of training: from its last checkpoint to its last step."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from dr_jax import nn, train
from dr_jax.checkpoint import Checkpoints, disk_bytes
from dr_jax.config import QuantConfig, TrainConfig, prefixed, quantizers
from dr_jax.pipeline import scoring, validation
from dr_jax.pipeline.context import RunContext
from dr_jax.runtime import processes, profile
from dr_jax.runtime.metrics import MetricsWriter

# Batches from which statistics of batch norm are re-estimated.
_RECALIBRATION_BATCHES = 10


class Phase(NamedTuple):
  """One phase of a stage.

  Attributes:
    stage: directory and name of the phase.
    bits: candidate bit-widths, (None,) for a float network.
    recipe: how to train.
    number, count: position of the phase, and how many divide the steps.
    sampling: number of steps -> train.Sampling, or None for the recipe's.
  """

  stage: str
  bits: tuple[int | None, ...]
  recipe: TrainConfig
  number: int = 0
  count: int = 1
  sampling: Callable[[int], train.Sampling] | None = None


class Plan(NamedTuple):
  """What a stage will train in one phase, for an estimate of what it takes.

  Attributes:
    name: directory and name of the phase.
    recipe: how it trains.
    quant: how the network is quantized; None for the float network.
    passes: bit-widths, or draws of them, in a step.
    count: how many phases divide the epochs.
    weight: the weight quantizer of the phase; None for that of `quant`.
    norm: the norms of the phase.
  """

  name: str
  recipe: TrainConfig
  quant: QuantConfig | None = None
  passes: int = 1
  count: int = 1
  weight: str | None = None
  norm: str = "switchable"


def plans(
  stage: str,
  recipe: TrainConfig,
  quant: QuantConfig | None = None,
  norm: str | None = None,
) -> list[Plan]:
  """Returns the phases of a stage, as `Plan`s.

  Args:
    stage: its name.
    recipe: how it trains.
    quant: how it quantizes the network; None for the float network.
    norm: the stage's own norms, in place of those of `quant`.
  """
  if quant is None:
    return [Plan(stage, recipe)] if recipe.epochs else []
  phases = train.CURRICULA[recipe.curriculum].phases
  return [
    Plan(
      _phase_name(stage, phase.name),
      recipe,
      quant,
      len(
        train.SAMPLINGS[phase.sampling or recipe.sampling].labels(quant.bits)
      ),
      len(phases),
      phase.weight,
      phase.norm or norm or quant.norm,
    )
    for phase in phases
  ]


def state_shapes(run: RunContext, plan: Plan) -> train.TrainState:
  """Returns the shapes of what a phase carries from step to step."""
  network = run.shape
  if plan.quant is not None:
    weight, activation = quantizers(_phase_config(plan.quant, plan.weight))
    network = nn.functional(
      nn.quantize(
        run.zeros(),
        weight=weight,
        activation=activation,
        sample=run.sample[:1],
        norm=plan.norm,
      )
    )
  return _state_shapes(run, network, plan.recipe)


def train_quantized(
  run: RunContext, stage: str, config: QuantConfig, recipe: TrainConfig
) -> nnx.Module:
  """Quantizes and trains the float network, or restores a finished stage.

  Args:
    run: the run, with the float network among its networks.
    stage: its name.
    config: how to quantize.
    recipe: how to train.
  """
  if stage in run.networks:
    return run.networks[stage]
  weight, activation = run.weight, run.activation
  if config is not run.config.quant:
    weight, activation = quantizers(config)
  network = nn.quantize(
    run.networks["float"],
    weight=weight,
    activation=activation,
    sample=run.sample,
    init=config.init,
    norm=config.norm,
  )
  started = time.monotonic()
  curriculum = train.CURRICULA[recipe.curriculum]
  current, steps = weight, 0
  for number, phase in enumerate(curriculum.phases):
    wanted = weight
    if phase.weight is not None:
      wanted, _ = quantizers(_phase_config(config, phase.weight))
    network = nn.requantize(
      network,
      weight=None if wanted is current else wanted,
      norm=phase.norm or config.norm,
    )
    nn.set_backend(network, config.backend)
    current = wanted
    steps = train_phase(
      run,
      network,
      Phase(
        _phase_name(stage, phase.name),
        weight.bits,
        dataclasses.replace(recipe, sampling=phase.sampling or recipe.sampling),
        number,
        len(curriculum.phases),
      ),
    )
  # A norm shared by all bit-widths keeps the statistics of all of them.
  if curriculum.recalibrate and config.norm != "shared":
    _recalibrate(run, network, weight.bits)
  scoring.finish_stage(
    run, stage, network, weight.bits, steps=steps, started=started
  )
  run.networks[stage] = network
  return network


def _phase_name(stage, phase):
  return "/".join(filter(None, (stage, phase)))


def _phase_config(config, weight):
  """How a phase with weights of its own quantizes."""
  if weight is None:
    return config
  return dataclasses.replace(config, weight=weight, weight_options={})


def _recalibrate(run, network, bits):
  batches = run.batches()
  images = [batches[step]["image"] for step in range(_RECALIBRATION_BATCHES)]
  for b in bits:
    nn.set_bits(network, b)
    nn.recalibrate(network, images)


def train_phase(run: RunContext, model: nnx.Module, phase: Phase) -> int:
  """Trains a model in place to the end of a phase, from its last checkpoint.

  Returns:
    The number of steps of the phase.
  """
  steps = step_count(run, phase)
  layout, trainer = _trainer(run, model, phase, steps)
  run.workdir.record_network(
    phase.stage,
    {"bits": phase.bits, "layers": [row.name for row in nn.layer_table(model)]},
  )
  directory = run.workdir.path / phase.stage
  key = jax.random.fold_in(jax.random.key(run.config.seed), phase.number)
  state = trainer.init(key)
  validates = validation.setting(run, phase.stage, phase.bits, phase.recipe)
  with (
    Checkpoints(directory / "checkpoints") as checkpoints,
    validation.opened(run, validates, model, steps, layout, state) as scorer,
  ):
    if checkpoints.latest() is not None:
      state = checkpoints.restore(like=state)
    # The last state is scored after its checkpoint.
    if int(state.step) < steps or (
      scorer is not None and run.workdir.result(phase.stage) is None
    ):
      size = checkpoint_bytes(phase.recipe, state)
      run.workdir.check_space({phase.stage: size})
      state = _run_loop(
        run, phase, steps, layout, trainer, checkpoints, scorer, state
      )
    if scorer is not None:
      state = scorer.best(state)
    params, batch_stats = train.gather(
      layout, (state.params, state.batch_stats)
    )
    nn.update(model, params=params, batch_stats=batch_stats)
  return steps


def _run_loop(run, phase, steps, layout, trainer, checkpoints, scorer, state):
  """Returns the state after the last step."""
  shard, shards = layout.shard
  with (
    _metrics(run) as metrics,
    _count_unreadable(run, phase.stage, shard),
    profile.profiled(
      trainer.step,
      run.profile,
      run.workdir.path / "profile" / phase.stage,
      name=phase.stage,
      remaining=steps - int(state.step),
    ) as step,
  ):
    if metrics is not None:
      metrics.resume(phase.stage, int(state.step))
    loop = train.Loop(
      stage=phase.stage,
      steps=steps,
      labels=trainer.labels,
      step=step,
      batches=run.batches(shard, shards),
      checkpoints=checkpoints,
      metrics=metrics,
      checkpoint_every=run.config.checkpoint_every,
      log_every=run.config.log_every,
      interrupted=run.agreed,
      put=layout.shard_batch,
      show_progress=processes.is_first(),
      validation=scorer,
    )
    return loop.run(state)


def disk_bytes_of(run: RunContext, recipe: TrainConfig) -> int:
  """Estimates the bytes of a stage's checkpoints from the float network.

  That network lacks the scales and norms of every bit-width; each phase checks
  the disk again for its own state.
  """
  # Every phase of the curriculum keeps checkpoints.
  phases = train.CURRICULA[recipe.curriculum].phases
  state = _state_shapes(run, run.shape, recipe)
  return len(phases) * checkpoint_bytes(recipe, state)


def checkpoint_bytes(recipe: TrainConfig, state: train.TrainState) -> int:
  """Returns what a phase's checkpoints take on disk at most."""
  return disk_bytes(state) + validation.disk_bytes(recipe, state)


def _state_shapes(run, network, recipe):
  """The state in which a network trains, as shapes."""

  def state(params, batch_stats):
    own = network._replace(params=params, batch_stats=batch_stats)
    trainer = train.make_trainer(
      own,
      train.make_optimizer(recipe.optimizer, param_labels=own.param_labels),
      lambda step: 0.0,
      schedule=recipe.schedule,
      distillation=recipe.distillation,
      num_classes=run.data.num_classes,
    )
    return trainer.init(jax.random.key(0))

  return jax.eval_shape(state, network.params, network.batch_stats)


def step_count(run: RunContext, phase: Phase | Plan) -> int:
  """Returns the number of steps of a phase."""
  images = phase.recipe.epochs * len(run.data.train)
  return max(images // (run.config.data.batch_size * phase.count), 1)


def _trainer(run, model, phase, steps):
  """The layout and the trainer of a phase."""
  network, recipe = nn.functional(model), phase.recipe
  sampling = train.SAMPLINGS[recipe.sampling]
  if phase.sampling is not None:
    sampling = phase.sampling(steps)
  vectorize = train.resolve_vectorize(recipe.vectorize, recipe.schedule)
  # Bit-widths spread over devices only if one program trains them at once.
  passes = len(train.pass_labels(network.bits, sampling))
  at_once = vectorize == "vmap" and passes % run.layout.bits == 0
  layout = run.layout if at_once else run.layout.flat()
  optimizer = train.make_optimizer(
    recipe.optimizer,
    param_labels=network.param_labels,
    weight_decay=recipe.weight_decay,
    momentum=recipe.momentum,
  )
  try:
    trainer = train.make_trainer(
      network,
      optimizer,
      train.cosine_schedule(recipe.learning_rate, steps, warmup=recipe.warmup),
      schedule=recipe.schedule,
      vectorize=vectorize,
      alrs=recipe.alrs,
      sampling=sampling,
      distillation=recipe.distillation,
      loss_weights=recipe.loss_weights,
      steps=steps,
      layout=layout,
      num_classes=run.data.num_classes,
    )
  except ValueError as error:
    raise prefixed("devices", error) from None
  return layout, trainer


def _metrics(run):
  """The metrics file in the process that writes it, None in others."""
  if processes.is_first():
    return MetricsWriter(run.workdir.metrics, run.sinks)
  return contextlib.nullcontext()


@contextlib.contextmanager
def _count_unreadable(run, stage, shard):
  """Warns, in the first process, about images that could not be read."""

  def unreadable():
    return collections.Counter(run.data.train.unreadable)

  before = unreadable()
  yield
  # Processes that feed the same shard have counted the same images.
  shards = dict(processes.gathered([shard, unreadable() - before]))
  count = sum(map(collections.Counter, shards.values()), collections.Counter())
  if count and processes.is_first():
    warnings.warn(
      f"{stage}: unreadable images: {len(count)}; the next readable one took "
      f"their place {count.total()} times since the stage started or resumed",
      stacklevel=2,
    )
