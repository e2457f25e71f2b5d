"""Stage supernet: the multi-precision network, trained further by HASB.

arXiv 2502.01199, section 3.3.
"""

from __future__ import annotations

import dataclasses
import time

from flax import nnx

from dr_jax import nn, train
from dr_jax.pipeline import phases, scoring, training
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.hessian import sensitivity
from dr_jax.pipeline.stages.multi_precision import multi_precision_network
from dr_jax.pipeline.stages.stage import Stage
from dr_jax.runtime import tree
from dr_jax.runtime.processes import on_first

_NORM = "transitional"


def supernet(run: RunContext) -> nnx.Module:
  """The SuperNet, trained; restored if its stage is done."""
  if STAGE.name in run.networks:
    return run.networks[STAGE.name]
  network = nn.requantize(multi_precision_network(run), norm=_NORM)
  # One process reads or estimates traces: all must draw the same bits.
  by_layer = on_first(lambda: sensitivity(run))
  started = time.monotonic()
  recipe, hasb = run.config.supernet, run.config.hasb

  def sampling(steps):
    return train.hasb.sampling(
      [by_layer[row.name] for row in nn.layer_table(network)],
      run.bits,
      steps=steps,
      epochs=recipe.epochs,
      start=hasb.sigma,
      warmup=hasb.warmup,
    )

  (phase,) = STAGE.phases(run)
  steps = training.train_phase(run, network, phase._replace(sampling=sampling))
  split = nn.functional(network)
  scoring.finish_stage(
    run,
    STAGE.name,
    network,
    run.bits,
    steps=steps,
    started=started,
    network=tree.fingerprint((split.params, split.batch_stats)),
  )
  run.networks[STAGE.name] = network
  return network


def _phases(run):
  quant = dataclasses.replace(run.config.quant, norm=_NORM)
  recipe = run.config.supernet
  return [phases.Phase(STAGE.name, run.bits, recipe, quant)]


STAGE = Stage(
  name="supernet",
  help="train the network for bit-widths that differ from layer to layer",
  run=supernet,
  needs=("hessian",),
  network=supernet,
  disk_bytes=lambda run: phases.disk_bytes_of(run, run.config.supernet),
  phases=_phases,
)
