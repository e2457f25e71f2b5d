"""Stage multi_precision: joint quantization-aware training."""

from __future__ import annotations

from flax import nnx

from dr_jax.pipeline import phases, training
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.pretrain import float_network
from dr_jax.pipeline.stages.stage import Stage


def multi_precision_network(run: RunContext) -> nnx.Module:
  """One network, trained at all bit-widths from the float network."""
  float_network(run)
  return training.train_quantized(
    run, STAGE.name, run.config.quant, run.config.train
  )


STAGE = Stage(
  name="multi_precision",
  help="train one network jointly at all bit-widths",
  run=multi_precision_network,
  network=multi_precision_network,
  disk_bytes=lambda run: phases.disk_bytes_of(run, run.config.train),
  phases=lambda run: phases.phases_of(
    STAGE.name, run.config.train, run.config.quant
  ),
)
