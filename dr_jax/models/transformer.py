"""A small decoder-only language model.

A block adds to its input what attention makes of it, then what a gated network
makes of the sum, each behind a norm (RMSNorm, arXiv 1910.07467):

  x + out(attention(rotate(query), rotate(key), value)),
  y + down(silu(gate(y)) * up(y))                       SwiGLU, arXiv 2002.05202

Positions turn queries and keys (rotary embeddings, arXiv 2104.09864), so that
attention depends on distances alone. Several heads of queries share one of keys
and values (grouped-query attention, arXiv 2305.13245). No layer has a bias, as
in LLaMA (arXiv 2302.13971).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dr_jax.models.attention_cache import Cache, KeyValues
from dr_jax.models.blocks import check_integer

# Standard deviation of initial weights, as GPT-2.
_STD = 0.02
# Base of the rotations' wavelengths (arXiv 2104.09864, section 3.4.3).
_BASE = 10_000.0


class Transformer(nnx.Module):
  """Decoder-only transformer: tokens int32 [n, t] -> logits [n, t, vocabulary].

  Logits are float32; those at position i depend on tokens 0..i and say what
  token i + 1 is. `model(tokens, cache=model.init_cache(n))` returns (logits,
  cache) of tokens that follow those in the cache.

  Args:
    vocabulary: number of different tokens.
    context: the longest sequence, and the slots of a cache.
    width: features of a token.
    depth: number of blocks.
    heads: of queries; they divide the width into an even number of features.
    kv_heads: of keys and values; a divisor of heads.
    hidden: features inside the gated networks; 0 for 8/3 of the width, rounded
      up to a multiple of 32.
    dtype: of the computation; parameters are float32.
    rngs: source of initial weights.

  Raises:
    ValueError: for a size that is not allowed, or, when called, a sequence
      longer than the context.
  """

  def __init__(
    self,
    *,
    vocabulary: int = 256,
    context: int = 256,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    _check_sizes(width, depth, heads, kv_heads, hidden)
    check_integer("vocabulary", vocabulary, 2, 2**20)
    check_integer("context", context, 1, 2**16)
    self.context, self.kv_heads = context, kv_heads
    self.head_width = width // heads
    hidden = hidden or -(-8 * width // (3 * 32)) * 32
    normal = nnx.initializers.normal(_STD)
    self.embed = nnx.Embed(
      vocabulary, width, embedding_init=normal, dtype=dtype, rngs=rngs
    )
    # Of 2 depth sums, each output adds its part to the variance.
    outward = nnx.initializers.normal(_STD / (2 * depth) ** 0.5)
    self.blocks = nnx.List(
      Block(
        width, heads, kv_heads, hidden, out_init=outward, dtype=dtype, rngs=rngs
      )
      for _ in range(depth)
    )
    self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
    self.head = _linear(width, vocabulary, normal, dtype, rngs)

  def __call__(self, tokens: jax.Array, cache: Cache | None = None):
    count = tokens.shape[1]
    if count > self.context:
      raise ValueError(
        f"tokens must be at most {self.context} in a row, the context, got "
        f"{count}"
      )
    x = self.embed(tokens)
    if cache is None:
      positions = jnp.arange(count, dtype=jnp.int32)
      mask = positions[None] <= positions[:, None]
      for block in self.blocks:
        x, _ = block(x, positions, mask)
      return self._logits(x)
    positions, cache = cache.extended(count)
    mask, layers = cache.mask(positions), []
    for block, stored in zip(self.blocks, cache.layers, strict=True):
      x, stored = block(x, positions, mask, stored)
      layers.append(stored)
    return self._logits(x), cache._replace(layers=tuple(layers))

  def init_cache(
    self, batch: int = 1, *, dtype: DTypeLike = jnp.float32
  ) -> Cache:
    """Returns the cache of no tokens.

    Tokens can follow without end, each sees the last `context` of them. A call
    with several tokens must not go around the end of the ring.

    Args:
      batch: number of sequences.
      dtype: of keys and values; int8 stores codes and scales.
    """
    shape = (batch, self.context, self.kv_heads, self.head_width)
    return Cache.empty(len(self.blocks), shape, dtype)

  def _logits(self, x):
    return self.head(self.norm(x)).astype(jnp.float32)


class Block(nnx.Module):
  """Attention and a gated network, each added to its input; [n, t, width]."""

  def __init__(
    self,
    width: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    *,
    out_init: nnx.Initializer,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.attention_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
    self.attention = Attention(
      width, heads, kv_heads, out_init=out_init, dtype=dtype, rngs=rngs
    )
    self.gated_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
    self.gated = Gated(width, hidden, out_init=out_init, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    stored: KeyValues | None = None,
  ) -> tuple[jax.Array, KeyValues | None]:
    y, stored = self.attention(self.attention_norm(x), positions, mask, stored)
    x += y
    return x + self.gated(self.gated_norm(x)), stored


class Attention(nnx.Module):
  """Causal attention of grouped heads with rotary positions; [n, t, width]."""

  def __init__(
    self,
    width: int,
    heads: int,
    kv_heads: int,
    *,
    out_init: nnx.Initializer,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.head_width = width // heads
    normal = nnx.initializers.normal(_STD)
    shared = kv_heads * self.head_width
    self.query = _linear(width, width, normal, dtype, rngs)
    self.key = _linear(width, shared, normal, dtype, rngs)
    self.value = _linear(width, shared, normal, dtype, rngs)
    self.out = _linear(width, width, out_init, dtype, rngs)
    self.attention_fn = nnx.dot_product_attention

  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    stored: KeyValues | None = None,
  ) -> tuple[jax.Array, KeyValues | None]:
    """Attends from x to itself, or to what is stored once it is written.

    Args:
      x: [n, t, width].
      positions: int32 [t], of x.
      mask: bool [t, s], which of the s keys each position sees.
      stored: keys and values in a cache, or None.

    Returns:
      The outputs [n, t, width], and what is stored then.
    """
    shape = (*x.shape[:2], -1, self.head_width)
    query = rotate(self.query(x).reshape(shape), positions)
    key = rotate(self.key(x).reshape(shape), positions)
    value = self.value(x).reshape(shape)
    if stored is not None:
      stored = stored.write(positions, key, value)
      key, value = stored.read(x.dtype)
    y = self.attention_fn(query, key, value, mask=mask[None, None])
    return self.out(y.reshape(x.shape)), stored


class Gated(nnx.Module):
  """SwiGLU: down(silu(gate(x)) * up(x)); [n, t, width]."""

  def __init__(
    self,
    width: int,
    hidden: int,
    *,
    out_init: nnx.Initializer,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    normal = nnx.initializers.normal(_STD)
    self.gate = _linear(width, hidden, normal, dtype, rngs)
    self.up = _linear(width, hidden, normal, dtype, rngs)
    self.down = _linear(hidden, width, out_init, dtype, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(nnx.silu(self.gate(x)) * self.up(x))


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
  """Rotary embedding: turns the pairs (x_i, x_{i + d/2}) by angles.

  At position p pair i is turned by p * 10000^(-2 i / d); the product of two
  vectors then depends on the difference of their positions alone.

  Args:
    x: [n, t, heads, d], d even.
    positions: int32 [t].

  References:
    arXiv 2104.09864, equation 34, with halves for its neighbors.
  """
  half = x.shape[-1] // 2
  rates = jnp.asarray(_BASE ** -(np.arange(half) / half), jnp.float32)
  angles = jnp.outer(positions.astype(jnp.float32), rates)[None, :, None]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return turned.astype(x.dtype)


def _linear(c_in, c_out, kernel_init, dtype, rngs):
  return nnx.Linear(
    c_in,
    c_out,
    use_bias=False,
    kernel_init=kernel_init,
    dtype=dtype,
    rngs=rngs,
  )


def _check_sizes(width, depth, heads, kv_heads, hidden):
  for name, value, low in (
    ("width", width, 2),
    ("depth", depth, 1),
    ("heads", heads, 1),
    ("kv_heads", kv_heads, 1),
    ("hidden", hidden, 0),
  ):
    check_integer(name, value, low, 2**16)
  if width % (2 * heads):
    raise ValueError(
      f"heads must divide width={width} into an even number of features, got "
      f"{heads}"
    )
  if heads % kv_heads:
    raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
