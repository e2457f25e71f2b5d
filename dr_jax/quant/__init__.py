"""Multi-precision quantizers as pure functions on arrays."""

from collections.abc import Callable

from dr_jax.quant.core.grid import (
  ROUNDINGS,
  SCALE_MAX,
  SCALE_MIN,
  check_bits,
  code_range,
  straight_through,
)
from dr_jax.quant.core.interface import (
  ActivationQuantizer,
  Storage,
  WeightQuantizer,
)
from dr_jax.quant.core.packing import pack, packed_size, storage, unpack
from dr_jax.quant.methods.adabits import adabits, pact_activation
from dr_jax.quant.methods.any_precision import any_precision, unit_activation
from dr_jax.quant.methods.binary_ternary import binary, ternary
from dr_jax.quant.methods.bit_mixer import bit_mixer
from dr_jax.quant.methods.bitwave import bitwave, skipped_columns
from dr_jax.quant.methods.double_rounding import double_rounding, switch_codes
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

__all__ = [
  "NAMES",
  "ROUNDINGS",
  "SCALE_MAX",
  "SCALE_MIN",
  "ActivationQuantizer",
  "Storage",
  "WeightQuantizer",
  "adabits",
  "any_precision",
  "binary",
  "bit_mixer",
  "bitwave",
  "check_bits",
  "code_range",
  "double_rounding",
  "fake_quantize",
  "float_weight",
  "get",
  "lsq",
  "lsq_activation",
  "lsq_plus",
  "lsq_plus_activation",
  "multi_resolution",
  "multi_resolution_activation",
  "pack",
  "packed_size",
  "pact_activation",
  "skipped_columns",
  "register",
  "storage",
  "straight_through",
  "switch_codes",
  "term_activation",
  "term_quantization",
  "ternary",
  "truncation",
  "unit_activation",
  "unpack",
]

_FACTORIES = {
  "double_rounding": double_rounding,
  "bit_mixer": bit_mixer,
  "lsq": lsq,
  "lsq_plus": lsq_plus,
  "float_weight": float_weight,
  "truncation": truncation,
  "bitwave": bitwave,
  "binary": binary,
  "ternary": ternary,
  "lsq_activation": lsq_activation,
  "lsq_plus_activation": lsq_plus_activation,
  "term_quantization": term_quantization,
  "term_activation": term_activation,
  "multi_resolution": multi_resolution,
  "multi_resolution_activation": multi_resolution_activation,
  "adabits": adabits,
  "pact_activation": pact_activation,
  "any_precision": any_precision,
  "unit_activation": unit_activation,
}

NAMES = _FACTORIES.keys()


def register(name: str, factory: Callable) -> None:
  """Adds a method to the registry, for configurations and artifacts.

  Args:
    name: what `get`, a configuration and an artifact call it; equal to the
      `name` of what the factory returns.
    factory: `factory(bits=..., *, option=default, ...)`, returning a
      WeightQuantizer or an ActivationQuantizer.

  Raises:
    ValueError: if the name is taken by another factory.
  """
  if _FACTORIES.setdefault(name, factory) is not factory:
    raise ValueError(f"quantizer {name!r}: is taken; allowed is another name")


def get(name: str, **options) -> WeightQuantizer | ActivationQuantizer:
  """Builds a quantizer by its registered name.

  Args:
    name: one of `NAMES`.
    **options: keyword arguments of that factory.

  Raises:
    ValueError: for an unknown name, an option that the method does not have,
      or an option's value that it does not allow.
  """
  if name not in _FACTORIES:
    raise ValueError(f"quantizer {name!r}: allowed are {', '.join(NAMES)}")
  factory = _FACTORIES[name]
  allowed = getattr(factory, "__kwdefaults__", None) or {}
  unknown = sorted(set(options) - set(allowed) - {"bits"})
  if unknown:
    raise ValueError(
      f"option {unknown[0]!r} of {name}: allowed are "
      f"{', '.join(['bits', *allowed])}"
    )
  return factory(**options)
