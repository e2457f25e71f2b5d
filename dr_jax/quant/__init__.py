"""Multi-precision quantizers as pure functions on arrays.

>>> import jax.numpy as jnp
>>> method = double_rounding((8, 4))
>>> w = jnp.array([[0.5, -1.0], [0.25, 1.0]])
>>> params = method.init(w)
>>> stored = method.encode(params, w)
>>> stored["codes"].dtype
dtype('int8')
>>> bool((method.decode(stored, 1) == method.fake_quantize(params, w, 1)).all())
True
"""

from dr_jax.quant.core.checks import ROUNDINGS, check_bits
from dr_jax.quant.core.fit import INITS, fit
from dr_jax.quant.core.grid import SCALE_MAX, SCALE_MIN, code_range
from dr_jax.quant.core.interface import (
  ActivationQuantizer,
  Integers,
  Storage,
  WeightQuantizer,
)
from dr_jax.quant.core.packing import pack, packed_size, storage, unpack
from dr_jax.quant.core.planes import pack_planes, unpack_planes
from dr_jax.quant.core.straight_through import straight_through
from dr_jax.quant.methods.adabits import adabits, pact_activation
from dr_jax.quant.methods.any_precision import any_precision, unit_activation
from dr_jax.quant.methods.binary_ternary import binary, ternary
from dr_jax.quant.methods.bit_mixer import bit_mixer
from dr_jax.quant.methods.bitwave import bitwave, skipped_columns
from dr_jax.quant.methods.double_rounding import double_rounding, switch_codes
from dr_jax.quant.methods.dynamic import dynamic_activation
from dr_jax.quant.methods.float_weight import float_weight
from dr_jax.quant.methods.lsq import fake_quantize, lsq, lsq_activation
from dr_jax.quant.methods.lsq_plus import lsq_plus, lsq_plus_activation
from dr_jax.quant.methods.multi_resolution import (
  multi_resolution,
  multi_resolution_activation,
)
from dr_jax.quant.methods.term_quantization import (
  term_activation,
  term_quantization,
)
from dr_jax.quant.methods.truncation import truncation
from dr_jax.quant.planes import (
  from_planes,
  matmul,
  matmul_bytes,
  planes_read,
  to_planes,
)
from dr_jax.quant.registry import (
  NAMES,
  RECIPES,
  Description,
  Recipe,
  activation_names,
  describe,
  find,
  get,
  method,
  options_of,
  register,
  register_recipe,
  weight_names,
)

__all__ = [
  "INITS",
  "NAMES",
  "RECIPES",
  "ROUNDINGS",
  "SCALE_MAX",
  "SCALE_MIN",
  "ActivationQuantizer",
  "Description",
  "Integers",
  "Recipe",
  "Storage",
  "WeightQuantizer",
  "activation_names",
  "adabits",
  "any_precision",
  "binary",
  "bit_mixer",
  "bitwave",
  "check_bits",
  "code_range",
  "describe",
  "double_rounding",
  "dynamic_activation",
  "fake_quantize",
  "fit",
  "float_weight",
  "from_planes",
  "get",
  "lsq",
  "lsq_activation",
  "lsq_plus",
  "lsq_plus_activation",
  "matmul",
  "matmul_bytes",
  "multi_resolution",
  "multi_resolution_activation",
  "pack",
  "pack_planes",
  "packed_size",
  "pact_activation",
  "planes_read",
  "skipped_columns",
  "method",
  "options_of",
  "register",
  "register_recipe",
  "storage",
  "straight_through",
  "switch_codes",
  "term_activation",
  "term_quantization",
  "ternary",
  "to_planes",
  "truncation",
  "unit_activation",
  "unpack",
  "unpack_planes",
  "weight_names",
]


def __getattr__(name: str):
  """Returns a factory that is not imported above by its name."""
  if name in NAMES:
    return find(name)
  raise AttributeError(f"module 'dr_jax.quant' has no attribute {name!r}")
