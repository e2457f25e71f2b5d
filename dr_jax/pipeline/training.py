"""One phase of training: from its last checkpoint to its last step."""

from __future__ import annotations

import collections
import contextlib
import time
import warnings

import jax
from flax import nnx

from dr_jax import nn, train
from dr_jax.checkpoint import Checkpoints
from dr_jax.config import QuantConfig, TrainConfig, prefixed, quantizers
from dr_jax.pipeline import scoring, validation
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.phases import (
  Phase,
  checkpoint_bytes,
  phases_of,
  step_count,
)
from dr_jax.runtime import processes, profile
from dr_jax.runtime.metrics import MetricsWriter

# Batches from which statistics of batch norm are re-estimated.
_RECALIBRATION_BATCHES = 10


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
  current, steps = config, 0
  for phase in phases_of(stage, recipe, config):
    wanted = phase.quant or config
    network = nn.requantize(
      network,
      weight=quantizers(wanted)[0] if wanted.weight != current.weight else None,
      norm=wanted.norm,
    )
    nn.set_backend(network, wanted.backend)
    current = wanted
    steps = train_phase(run, network, phase)
  # A norm shared by all bit-widths keeps the statistics of all of them.
  recalibrate = train.CURRICULA[recipe.curriculum].recalibrate
  if recalibrate and config.norm != "shared":
    _recalibrate(run, network, weight.bits)
  scoring.finish_stage(
    run, stage, network, weight.bits, steps=steps, started=started
  )
  run.networks[stage] = network
  return network


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
  at_once = phase.recipe.steps_per_call
  with (
    _metrics(run) as metrics,
    _count_unreadable(run, phase.stage, shard),
    profile.profiled(
      trainer.logged_step,
      run.profile,
      run.workdir.path / "profile" / phase.stage,
      name=phase.stage,
      remaining=-(-(steps - int(state.step)) // at_once),
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
      steps_per_call=at_once,
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


def _trainer(run, model, phase, steps):
  """The layout and the trainer of a phase."""
  network, recipe = nn.functional(model), phase.recipe
  sampling = train.SAMPLINGS[recipe.sampling]
  if phase.sampling is not None:
    sampling = phase.sampling(steps)
  passes = len(train.pass_labels(network.bits, sampling))
  vectorize = train.resolve_vectorize(
    recipe.vectorize, recipe.schedule, layers=network.layers, passes=passes
  )
  # Bit-widths spread over devices only if one program trains them at once.
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
