"""Multi-precision layers for any Flax NNX network."""

from dr_jax.nn.bits import (
  Bits,
  LayerRow,
  LayerTable,
  NormParam,
  Scale,
  candidates,
  layer_table,
  set_bits,
)
from dr_jax.nn.convert import first_and_last, quantize
from dr_jax.nn.functional import Functional, functional, recalibrate, update
from dr_jax.nn.layers import Conv, Linear, StoredConv, StoredLinear
from dr_jax.nn.norm import BatchNorm

__all__ = [
  "BatchNorm",
  "Bits",
  "Conv",
  "Functional",
  "LayerRow",
  "LayerTable",
  "Linear",
  "NormParam",
  "Scale",
  "StoredConv",
  "StoredLinear",
  "candidates",
  "first_and_last",
  "functional",
  "layer_table",
  "quantize",
  "recalibrate",
  "set_bits",
  "update",
]
