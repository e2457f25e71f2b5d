"""Multi-precision quantizers as pure functions on arrays."""

from dr_jax.quant.bit_mixer import bit_mixer
from dr_jax.quant.double_rounding import double_rounding, switch_codes
from dr_jax.quant.grid import (
  ROUNDINGS,
  SCALE_MAX,
  SCALE_MIN,
  check_bits,
  code_range,
)
from dr_jax.quant.lsq import fake_quantize, lsq, lsq_activation
from dr_jax.quant.packing import pack, packed_size, unpack
from dr_jax.quant.quantizer import ActivationQuantizer, WeightQuantizer

__all__ = [
  "NAMES",
  "ROUNDINGS",
  "SCALE_MAX",
  "SCALE_MIN",
  "ActivationQuantizer",
  "WeightQuantizer",
  "bit_mixer",
  "check_bits",
  "code_range",
  "double_rounding",
  "fake_quantize",
  "get",
  "lsq",
  "lsq_activation",
  "pack",
  "packed_size",
  "switch_codes",
  "unpack",
]

_FACTORIES = {
  "double_rounding": double_rounding,
  "bit_mixer": bit_mixer,
  "lsq": lsq,
  "lsq_activation": lsq_activation,
}

NAMES = tuple(_FACTORIES)


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
  allowed = factory.__kwdefaults__ or {}
  unknown = sorted(set(options) - set(allowed) - {"bits"})
  if unknown:
    raise ValueError(
      f"option {unknown[0]!r} of {name}: allowed are "
      f"{', '.join(['bits', *allowed])}"
    )
  return factory(**options)
