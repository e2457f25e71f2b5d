"""Attention whose two products are modules, so that they can be quantized.

  softmax(q_hat k_hat^T / sqrt(d) + mask)_hat v_hat

A network calls a function for it, `nnx.dot_product_attention`, that one of its
modules holds as an attribute (`attention_fn` of nnx.MultiHeadAttention). In its
place `nn.products` puts an `Attention` of six modules: four operands, which are
quantized one by one, and their two products, which count costs.
Values are floats: products of integers times two scales, up to float rounding.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes

from dr_jax.nn.bits import Bits, arrays_of, quantize_at, variables_of
from dr_jax.quant import ActivationQuantizer

# The products, and the operands of each.
PRODUCTS = {"scores": ("query", "key"), "outputs": ("weights", "value")}


class Operand(nnx.Module):
  """An operand of a product, float: returns its input.

  Attributes:
    stack: axes of the layers around it, where it stands for several.
  """

  def __init__(self, stack: tuple[int, ...] = ()):
    self.stack = stack

  def __call__(self, x: jax.Array) -> jax.Array:
    return x


class QuantizedOperand(Operand):
  """An operand of a product, fake-quantized.

  Attributes:
    bits: Bits of the layer that it follows; see `nn.quantize`.
    input_quantizer: static.
    input_params: its learned parameters, of a stack with its axes.
  """

  def __init__(
    self,
    quantizer: ActivationQuantizer,
    params: dict[str, jax.Array],
    bits: Bits,
    stack: tuple[int, ...] = (),
  ):
    super().__init__(stack)
    self.bits = bits
    self.input_quantizer = quantizer
    self.input_params = variables_of(params)

  @property
  def numbers(self) -> np.ndarray:
    """Numbers of the layers that it follows, with the axes of its stack."""
    orders = np.reshape(self.bits.orders, self.bits.stack)
    return np.broadcast_to(orders, self.stack)

  def __call__(self, x: jax.Array) -> jax.Array:
    params = arrays_of(self.input_params)
    quantize = self.input_quantizer.fake_quantize
    return quantize_at(lambda i: quantize(params, x, i), self.bits.get_value())


class Product(nnx.Module):
  """A product of two operands; sums run over the last axis of the first."""

  def __init__(self, stack: tuple[int, ...] = ()):
    self.stack = stack

  def __call__(
    self, a: jax.Array, b: jax.Array, subscripts: str, **options: Any
  ) -> jax.Array:
    return jnp.einsum(subscripts, a, b, **options)

  @staticmethod
  def macs(a: jax.Array, y: jax.Array) -> int:
    """Multiply-accumulates of one call with result y."""
    return y.size * a.shape[-1]


class Attention(nnx.Module):
  """`nnx.dot_product_attention` as a module, called as that function is.

  Attributes:
    query, key, weights, value: Operand or QuantizedOperand; `weights` are those
      of the softmax.
    scores, outputs: Product, query x key and weights x value.
  """

  def __init__(self, stack: tuple[int, ...] = ()):
    self.query, self.key = Operand(stack), Operand(stack)
    self.scores = Product(stack)
    self.weights, self.value = Operand(stack), Operand(stack)
    self.outputs = Product(stack)

  def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nnx.Module | None = None,
    promote_dtype: Any = dtypes.promote_dtype,
    is_causal: bool = False,
  ) -> jax.Array:
    """Attends; dropout acts on the quantized weights.

    Args:
      query: [..., t, heads, d].
      key: [..., s, groups, d]; the groups divide the heads, neighbors share one
        (grouped-query attention, arXiv 2305.13245).
      value: [..., s, groups, d_v].
      bias, mask: broadcastable to [..., heads, t, s]; added to the scores, and
        true where the softmax looks.
      broadcast_dropout, dropout_rng, dropout_rate, deterministic, dtype,
        precision, module, promote_dtype, is_causal: as of
        `nnx.dot_product_attention`.

    Returns:
      [..., t, heads, d_v].
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    dtype, (*batch, t, heads, depth) = query.dtype, query.shape
    s, groups = key.shape[-3:-1]
    if heads % groups:
      raise ValueError(
        f"heads of queries must be a multiple of those of keys, {groups}, got "
        f"{heads}"
      )
    each = heads // groups
    scores = self.scores(
      self.query(query).reshape(*batch, t, groups, each, depth),
      self.key(key),
      "...tgrd,...sgd->...grts",
      precision=precision,
      # (jnp.promote_types raises in strict mode)
      preferred_element_type=jnp.float64 if dtype == "float64" else jnp.float32,
    ).reshape(*batch, heads, t, s)
    scores = _masked(scores / math.sqrt(depth), bias, mask, is_causal)
    weights = self.weights(jax.nn.softmax(scores).astype(dtype))
    if module is not None:
      module.sow(nnx.Intermediate, "attention_weights", weights)
    if dropout_rate > 0 and not deterministic:
      shape = (1,) * (weights.ndim - 2) + (t, s)
      shape = shape if broadcast_dropout else weights.shape
      kept = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, shape)
      weights = jnp.where(kept, weights / (1 - dropout_rate), 0)
    outputs = self.outputs(
      weights.reshape(*batch, groups, each, t, s),
      self.value(value),
      "...grts,...sgd->...tgrd",
      precision=precision,
    )
    return outputs.reshape(*batch, t, heads, value.shape[-1])


def _masked(scores, bias, mask, is_causal):
  """Scores [..., t, s] with a bias, and the lowest float where masked."""
  if bias is not None:
    scores += jnp.broadcast_to(bias, scores.shape).astype(scores.dtype)
  masks = [] if mask is None else [mask.astype(bool)]
  if is_causal:
    masks.append(jnp.tri(*scores.shape[-2:], dtype=bool))
  for each in masks:
    each = jnp.broadcast_to(each, scores.shape)
    scores = jnp.where(each, scores, jnp.finfo(scores.dtype).min)
  return scores
