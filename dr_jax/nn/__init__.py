"""Multi-precision layers for any Flax NNX network."""

from dr_jax.nn import bits, deployed, layers, quantized, stored
from dr_jax.nn.backend_choice import (
  set_backend,
  supports,
  time_backends,
)
from dr_jax.nn.backends import BACKENDS
from dr_jax.nn.bits import Bits, NormParam, Offset, Scale
from dr_jax.nn.coverage import Coverage, CoverageRow, coverage
from dr_jax.nn.functional import Functional, functional, update
from dr_jax.nn.inputs import Inputs
from dr_jax.nn.layer_table import (
  LayerRow,
  LayerTable,
  kernel_paths,
  layer_table,
  set_bits,
  tied_layers,
)
from dr_jax.nn.layers import (
  Conv,
  ConvTranspose,
  Einsum,
  Embed,
  Linear,
  LinearGeneral,
  LoRALinear,
)
from dr_jax.nn.norm import KINDS as NORMS
from dr_jax.nn.norm import BatchNorm, FoldedNorm
from dr_jax.nn.quantize import first_and_last, quantize
from dr_jax.nn.quantized import candidates
from dr_jax.nn.recalibrate import recalibrate
from dr_jax.nn.requantize import requantize
from dr_jax.nn.stored import StoredConv, StoredLinear

__all__ = [
  "BACKENDS",
  "NORMS",
  "BatchNorm",
  "Bits",
  "Conv",
  "ConvTranspose",
  "Coverage",
  "CoverageRow",
  "Einsum",
  "Embed",
  "FoldedNorm",
  "Functional",
  "Inputs",
  "LayerRow",
  "LayerTable",
  "Linear",
  "LinearGeneral",
  "LoRALinear",
  "NormParam",
  "Offset",
  "Scale",
  "StoredConv",
  "StoredLinear",
  "bits",
  "candidates",
  "coverage",
  "deployed",
  "first_and_last",
  "functional",
  "kernel_paths",
  "layer_table",
  "layers",
  "quantize",
  "quantized",
  "recalibrate",
  "requantize",
  "set_backend",
  "set_bits",
  "stored",
  "supports",
  "tied_layers",
  "time_backends",
  "update",
]
