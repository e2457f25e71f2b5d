"""Stage separate: one LSQ network per bit-width, for comparison."""

from __future__ import annotations

import dataclasses

from dr_jax import quant
from dr_jax.config import QuantConfig
from dr_jax.pipeline import phases, training
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.pretrain import float_network
from dr_jax.pipeline.stages.stage import Stage

_LSQ = quant.RECIPES["lsq"]


def train_separately(run: RunContext) -> None:
  """Trains one LSQ network per bit-width with the same recipe."""
  recipe = _recipe(run)
  for bits, name in zip(run.bits, result_names(run), strict=True):
    if run.workdir.result(name) is None:
      float_network(run)
      training.train_quantized(run, name, _quant(bits), recipe)


def _phases(run):
  return [
    phase
    for bits, name in zip(run.bits, result_names(run), strict=True)
    for phase in phases.phases_of(name, _recipe(run), _quant(bits))
  ]


def _recipe(run):
  return dataclasses.replace(
    run.config.train,
    schedule=_LSQ.schedule,
    vectorize="auto",
    sampling=_LSQ.sampling,
    distillation=_LSQ.distillation,
    alrs=_LSQ.alrs,
    loss_weights=(),
    curriculum=_LSQ.curriculum,
  )


def _quant(bits):
  return QuantConfig(
    bits=(bits,), weight=_LSQ.weight, activation=_LSQ.activation
  )


def result_names(run: RunContext) -> tuple[str, ...]:
  """One directory and result per bit-width."""
  return tuple(f"{STAGE.name}/{bits}" for bits in run.bits)


STAGE = Stage(
  name="separate",
  help="train one LSQ network per bit-width, for comparison",
  run=train_separately,
  disk_bytes=lambda run: (
    len(run.bits) * phases.disk_bytes_of(run, run.config.train)
  ),
  phases=_phases,
  results=result_names,
)
