"""Multi-precision layers for any Flax NNX network."""

from dr_jax.nn.bits import (
  Bits,
  LayerRow,
  LayerTable,
  NormParam,
  Offset,
  Scale,
  candidates,
  layer_table,
  set_bits,
)
from dr_jax.nn.deployed import Frozen, StoredLayer, StoredNorm, freeze, thaw
from dr_jax.nn.functional import Functional, functional, recalibrate, update
from dr_jax.nn.layers import Conv, Linear, StoredConv, StoredLinear
from dr_jax.nn.norm import KINDS as NORMS
from dr_jax.nn.norm import BatchNorm, FoldedNorm
from dr_jax.nn.quantize import first_and_last, quantize
from dr_jax.nn.requantize import requantize

__all__ = [
  "NORMS",
  "BatchNorm",
  "Bits",
  "Conv",
  "FoldedNorm",
  "Frozen",
  "Functional",
  "LayerRow",
  "LayerTable",
  "Linear",
  "NormParam",
  "Offset",
  "Scale",
  "StoredConv",
  "StoredLayer",
  "StoredLinear",
  "StoredNorm",
  "candidates",
  "first_and_last",
  "freeze",
  "functional",
  "layer_table",
  "quantize",
  "recalibrate",
  "requantize",
  "set_bits",
  "thaw",
  "update",
]
