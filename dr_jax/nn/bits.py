"""The bit-width as state: one int32 per quantized layer, one or two per norm.

A `Bits` variable holds a position in the candidate bit-widths. Because it is
an array and not an argument, one compiled program serves every assignment and
no model's `__call__` changes. In its place a float [n] may stand: the weights
of a mixture of all n candidates, which a search can differentiate.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx


class Bits(nnx.Variable):
  """Position in the candidate bit-widths: an int32 scalar, not trained.

  Each variable names the quantized layer that it follows, so that a module may
  have several: a norm for every pair of neighboring bit-widths (transitional
  batch norm, Bit-Mixer, ICCV 2021) has its layer's and the previous layer's.
  """

  @classmethod
  def following(cls, order: int) -> Bits:
    """The Bits of the quantized layer number `order`, at the highest."""
    return cls(jnp.int32(0), follows=order)

  @property
  def order(self) -> int:
    """Number of the layer it follows, in call order."""
    return self.get_metadata("follows")


def is_mixture(index: int | jax.Array) -> bool:
  """Whether a value of Bits holds weights [n] and not a position."""
  return jnp.issubdtype(getattr(index, "dtype", int), jnp.floating)


def quantize_at(
  quantize: Callable[[int | jax.Array], jax.Array], index: int | jax.Array
) -> jax.Array:
  """Returns quantize(index), or the weighted sum over all candidates."""
  if not is_mixture(index):
    return quantize(index)
  weights = enumerate(jnp.asarray(index))
  terms = [quantize(position) * weight for position, weight in weights]
  return functools.reduce(operator.add, terms)


class Scale(nnx.Param):
  """A learned scale of a quantizer: trained, never decayed, kept positive."""


class Offset(nnx.Param):
  """Any other learned quantization parameter (an offset, a clipping level).

  Trained and never decayed, as scales are, but of either sign.
  """


class NormParam(nnx.Param):
  """Scale or bias of a norm with rows: one per bit-width, or pair of them."""


def all_bits(model: nnx.Module) -> Iterator[tuple[tuple, Bits]]:
  """Yields every Bits variable with its path.

  A quantized layer follows itself; a norm follows the quantized layer whose
  output it normalizes, else the one that was called last before it (the first
  layer, if there was none). A transitional norm also follows the quantized
  layer that was called just before that one.
  """
  for path, node in nnx.iter_graph(model):
    if isinstance(node, Bits):
      yield path, node
