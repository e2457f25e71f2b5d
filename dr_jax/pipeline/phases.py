"""What a stage trains: its phases, and what they take, before any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from dr_jax import nn, train
from dr_jax.checkpoint import disk_bytes
from dr_jax.config import QuantConfig, TrainConfig, quantizers
from dr_jax.pipeline import validation
from dr_jax.pipeline.context import RunContext


class Phase(NamedTuple):
  """One phase of a stage.

  Attributes:
    stage: directory and name of the phase.
    bits: candidate bit-widths, (None,) for a float network.
    recipe: how to train.
    quant: how the network is quantized; None for a float network.
    number, count: position of the phase, and how many divide the steps.
    sampling: number of steps -> train.Sampling, or None for the recipe's.
  """

  stage: str
  bits: tuple[int | None, ...]
  recipe: TrainConfig
  quant: QuantConfig | None = None
  number: int = 0
  count: int = 1
  sampling: Callable[[int], train.Sampling] | None = None


def float_phases(stage: str, recipe: TrainConfig) -> list[Phase]:
  """Returns the phase of a float network, none without epochs."""
  return [Phase(stage, (None,), recipe)] if recipe.epochs else []


def phases_of(
  stage: str, recipe: TrainConfig, quant: QuantConfig
) -> list[Phase]:
  """Returns the phases of a stage that trains a quantized network.

  Args:
    stage: its name.
    recipe: how it trains, with a curriculum.
    quant: how it quantizes the network, where a phase has no own way.
  """
  phases = train.CURRICULA[recipe.curriculum].phases
  found = []
  for number, phase in enumerate(phases):
    own = dataclasses.replace(quant, norm=phase.norm or quant.norm)
    if phase.weight is not None:
      own = dataclasses.replace(own, weight=phase.weight, weight_options={})
    found.append(
      Phase(
        "/".join(filter(None, (stage, phase.name))),
        quant.bits,
        dataclasses.replace(recipe, sampling=phase.sampling or recipe.sampling),
        own,
        number,
        len(phases),
      )
    )
  return found


def step_count(run: RunContext, phase: Phase) -> int:
  """Returns the number of steps of a phase."""
  images = phase.recipe.epochs * len(run.data.train)
  return max(images // (run.config.data.batch_size * phase.count), 1)


def pass_count(phase: Phase) -> int:
  """Returns how many bit-widths, or draws of them, a step trains."""
  if phase.quant is None:
    return 1
  return len(train.SAMPLINGS[phase.recipe.sampling].labels(phase.quant.bits))


class Memory(NamedTuple):
  """What the training of a phase takes.

  Attributes:
    state: shapes of what it carries from step to step.
    activations: bytes that a step keeps for its backward passes at most, on
      each device; see `train.residual_bytes`.
  """

  state: train.TrainState
  activations: int


def memory(run: RunContext, phase: Phase) -> Memory:
  """Returns what a phase will take; traces a pass, compiles nothing."""
  network = run.shape
  if phase.quant is not None:
    weight, activation = quantizers(phase.quant)
    network = nn.functional(
      nn.quantize(
        run.zeros(),
        weight=weight,
        activation=activation,
        sample=run.sample[:1],
        norm=phase.quant.norm,
      )
    )
  recipe, batch = phase.recipe, run.config.data.batch_size
  inputs = jax.ShapeDtypeStruct(
    (batch, *run.sample.shape[1:]), run.sample.dtype
  )
  count = pass_count(phase)
  vectorize = train.resolve_vectorize(
    recipe.vectorize, recipe.schedule, layers=network.layers, passes=count
  )
  passes = train.passes_at_once(vectorize, count)
  # Devices share the batch, or the passes, or both.
  kept = passes * train.residual_bytes(network, inputs)
  return Memory(
    _state_shapes(run, network, recipe), -(-kept // run.layout.mesh.size)
  )


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
