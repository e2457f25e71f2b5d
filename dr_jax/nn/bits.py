"""The bit-width as state: one int32 per quantized layer, one or two per norm.

A `Bits` variable holds a position in the candidate bit-widths. Because it is
an array and not an argument, one compiled program serves every assignment and
no model's `__call__` changes. In its place a float [n] may stand: the weights
of a mixture of all n candidates, which a search can differentiate.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Bits(nnx.Variable):
  """Position in the candidate bit-widths: an int32 scalar, not trained.

  Each variable names the quantized layer that it follows, so that a module may
  have several: a norm for every pair of neighboring bit-widths (transitional
  batch norm, Bit-Mixer, ICCV 2021) has its layer's and the previous layer's.
  Layers that are stacked (`nnx.scan`) have one variable, with their axes.
  """

  @classmethod
  def following(cls, order: int, stack: tuple[int, ...] = ()) -> Bits:
    """The Bits of layers from number `order` on, at the highest bit-width.

    Args:
      order: number of the quantized layer, or of the first of a stack.
      stack: axes of the stack.
    """
    return cls(jnp.zeros(stack, jnp.int32), follows=order, stack=stack)

  @property
  def order(self) -> int:
    """Number of the layer it follows, in call order, or of the first."""
    return self.get_metadata("follows")

  @property
  def stack(self) -> tuple[int, ...]:
    """Axes of the stack of layers that it follows; () for one layer."""
    return self.get_metadata("stack")

  @property
  def orders(self) -> tuple[int, ...]:
    """Numbers of all layers it follows."""
    return tuple(range(self.order, self.order + math.prod(self.stack)))

  def at(self, index: jax.Array) -> jax.Array:
    """Its value, of the positions [layers] or weights [layers, n] of all."""
    if not self.stack:
      return index[self.order]
    return index[np.array(self.orders).reshape(self.stack)]


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


def arrays_of(variables: Mapping[str, nnx.Variable]) -> dict[str, jax.Array]:
  """The plain arrays of a dict of variables."""
  return {name: variable[...] for name, variable in variables.items()}


def variables_of(arrays: dict[str, Any]) -> dict[str, Any]:
  """Variables of learned parameters: only "scale" has to stay positive."""
  # A plain dict: Flax gives an nnx.Dict entries of its own (nnx.capture).
  return nnx.data(
    {k: (Scale if k == "scale" else Offset)(v) for k, v in arrays.items()}
  )


def all_bits(model: nnx.Module) -> Iterator[tuple[tuple, Bits]]:
  """Yields every Bits variable with its path.

  A quantized layer follows itself; a norm, and an operand of a product of
  attention, the quantized layer whose output it takes, else the one that was
  called last before it (the first layer, if there was none). A transitional
  norm also follows the quantized layer that was called just before that one.
  """
  for path, node in nnx.iter_graph(model):
    if isinstance(node, Bits):
      yield path, node


def set_index(model: nnx.Module, index: Sequence[int]) -> None:
  """Sets the position of every layer, [layers], in place."""
  positions = jnp.array(index, jnp.int32)
  for _, variable in all_bits(model):
    variable.set_value(variable.at(positions))
