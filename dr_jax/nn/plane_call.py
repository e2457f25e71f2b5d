"""One call of a linear layer that reads bit-planes: float inputs, few bits.

The Flax layer promotes dtypes and adds its bias as it always does; it sees a
`PlaneCall` in its place, which has no kernel: the product reads the planes of
the bit-width in use (`quant.matmul`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax import quant
from dr_jax.nn.integer_call import LayerCall
from dr_jax.quant import WeightQuantizer


class PlaneCall(LayerCall):
  """A call of a layer of stored planes."""

  def promote_dtype(self, arrays: Any, /, dtype: Any = None) -> Any:
    inputs, _, bias = arrays
    # As the decoded kernel would take part.
    like = jnp.zeros((), self.layer.param_dtype)
    inputs, _, bias = self.layer.promote((inputs, like, bias), dtype=dtype)
    return inputs, None, bias

  def dot_general(
    self, x: jax.Array, w: None, dimension_numbers: Any, **options: Any
  ) -> jax.Array:
    del w, dimension_numbers, options  # Those of nnx.Linear.
    exact = x.dtype in (jnp.float32, jnp.bfloat16)
    y = self._product(x if exact else x.astype(jnp.float32))
    return y.astype(x.dtype)

  def _product(self, x):
    layer, weight = self.layer, self.layer.weight_quantizer
    # Below `first`, planes are missing: `if_held` gives no numbers there.
    products = [
      functools.partial(
        quant.matmul,
        bits=weight.bits[max(position, layer.first)],
        rounding=dict(weight.options)["rounding"],
        stored_bits=weight.stored_bits,
      )
      for position in range(len(weight.bits))
    ]
    operands = x, *(layer.encoded[name][...] for name in ("planes", "scale"))
    index = layer.bits.get_value()
    if isinstance(index, int):
      y = products[index](*operands)
    else:
      y = jax.lax.switch(index, products, *operands)
    return layer.if_held(y, index)


def with_planes(
  arrays: dict[str, jax.Array], weight: WeightQuantizer, first: int
) -> dict[str, jax.Array]:
  """Stored arrays with planes in place of codes: those that were read.

  Args:
    arrays: "codes" [k, n] and others.
    weight: whose codes they are.
    first: position of the highest bit-width that the codes serve.
  """
  codes = arrays["codes"]
  others = {name: value for name, value in arrays.items() if name != "codes"}
  needed = weight.storage.planes  # () for a single bit-width
  count = needed[first] if needed else weight.stored_bits
  return {
    "planes": quant.to_planes(codes, weight.stored_bits)[:count],
    **others,
  }


def with_codes(
  arrays: dict[str, jax.Array], weight: WeightQuantizer, rows: int
) -> dict[str, jax.Array]:
  """Inverse of `with_planes`; `rows` are those of the kernel."""
  planes = arrays["planes"]
  others = {name: value for name, value in arrays.items() if name != "planes"}
  missing = weight.stored_bits - len(planes)
  return {"codes": quant.from_planes(planes, rows) << missing, **others}


def unsupported(layer: Any) -> str | None:
  """Why a quantized layer cannot compute with planes; None if it can."""
  if layer.computes_as is not nnx.Linear:
    return "it is not linear"
  if layer.stack:
    return "it stands for a stack of layers"
  if not hasattr(layer, "encoded"):
    return "it has a float kernel; pass what deploy.load returned"
  if layer.input_quantizer is not None:
    return "its inputs are quantized"
  if layer.preferred_element_type is not None:
    return "its product has a dtype of its own"
  weight = layer.weight_quantizer
  options = dict(weight.options)
  nested = weight.name == "double_rounding" and weight.integers is not None
  if not nested or not options["shared"]:
    return f"codes of {weight.name} are not planes of shared ones"
  if options["rounding"] == "half_even":
    return "rounding 'half_even' needs all planes"
  return None
