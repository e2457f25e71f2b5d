"""Stage separate: one LSQ network per bit-width, for comparison."""

from __future__ import annotations

import dataclasses

from dr_jax import quant
from dr_jax.config import QuantConfig
from dr_jax.pipeline import training
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.pretrain import float_network
from dr_jax.pipeline.stages.stage import Stage


def train_separately(run: RunContext) -> None:
  """Trains one LSQ network per bit-width with the same recipe."""
  lsq = quant.RECIPES["lsq"]
  recipe = dataclasses.replace(
    run.config.train,
    schedule=lsq.schedule,
    vectorize="auto",
    sampling=lsq.sampling,
    distillation=lsq.distillation,
    alrs=lsq.alrs,
    loss_weights=(),
    curriculum=lsq.curriculum,
  )
  for bits, name in zip(run.bits, result_names(run), strict=True):
    if run.workdir.result(name) is None:
      float_network(run)
      config = QuantConfig(
        bits=(bits,), weight=lsq.weight, activation=lsq.activation
      )
      training.train_quantized(run, name, config, recipe)


def result_names(run: RunContext) -> tuple[str, ...]:
  """One directory and result per bit-width."""
  return tuple(f"{STAGE.name}/{bits}" for bits in run.bits)


STAGE = Stage(
  name="separate",
  help="train one LSQ network per bit-width, for comparison",
  run=train_separately,
  disk_bytes=lambda run: (
    len(run.bits) * training.disk_bytes_of(run, run.config.train)
  ),
  results=result_names,
)
