"""Stage pretrain: the float network."""

from __future__ import annotations

import time

from flax import nnx

from dr_jax.pipeline import phases, scoring, training
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.stage import Stage


def float_network(run: RunContext) -> nnx.Module:
  """The float network, trained if the run has this stage."""
  if "float" not in run.networks:
    run.networks["float"] = _float_network(run)
  return run.networks["float"]


def _float_network(run):
  if run.start is not None:
    return run.start
  model = run.untrained()
  if STAGE.name not in run.config.stages:
    return model
  started, steps = time.monotonic(), 0
  for phase in STAGE.phases(run):
    steps = training.train_phase(run, model, phase)
  scoring.finish_stage(
    run, STAGE.name, model, (None,), steps=steps, started=started
  )
  return model


STAGE = Stage(
  name="pretrain",
  help="train the float network",
  run=float_network,
  network=float_network,
  disk_bytes=lambda run: phases.disk_bytes_of(run, run.config.pretrain),
  phases=lambda run: phases.float_phases(STAGE.name, run.config.pretrain),
)
