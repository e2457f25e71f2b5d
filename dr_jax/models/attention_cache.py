"""Keys and values of the positions so far, for decoding byte by byte.

A ring of `length` slots: position p lies in slot p mod length, so that memory
is constant and a token sees the last `length` positions, its own included.
With int8 every key and value of a head is codes and one scale,

  x ~ codes * scale,  scale = max|x| / 127,  codes = round(x / scale),

which takes 1/4 + 1/d of float32's bytes for heads of d features.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_LARGEST = 127


class Rows(NamedTuple):
  """One vector per batch entry, slot and head.

  Attributes:
    values: [n, length, heads, d], floats, or int8 codes.
    scale: float32 [n, length, heads] of codes, None of floats.
  """

  values: jax.Array
  scale: jax.Array | None

  @classmethod
  def zeros(cls, shape: tuple[int, ...], dtype: DTypeLike) -> Rows:
    """Rows of zeros; int8 has scales."""
    codes = jnp.dtype(dtype) == jnp.int8
    scale = jnp.zeros(shape[:-1], jnp.float32) if codes else None
    return cls(jnp.zeros(shape, dtype), scale)

  def write(self, slots: jax.Array, x: jax.Array) -> Rows:
    """Rows with x, floats [n, t, heads, d], in the slots, int32 [t]."""
    if self.scale is None:
      x = x.astype(self.values.dtype)
      return self._replace(values=self.values.at[:, slots].set(x))
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / _LARGEST
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
    return Rows(
      self.values.at[:, slots].set(codes.astype(jnp.int8)),
      self.scale.at[:, slots].set(scale),
    )

  def read(self, dtype: DTypeLike) -> jax.Array:
    """All vectors, [n, length, heads, d]."""
    if self.scale is None:
      return self.values.astype(dtype)
    x = self.values.astype(jnp.float32) * self.scale[..., None]
    return x.astype(dtype)


class KeyValues(NamedTuple):
  """Keys and values of one block."""

  keys: Rows
  values: Rows

  def write(
    self, positions: jax.Array, key: jax.Array, value: jax.Array
  ) -> KeyValues:
    """Stores keys and values [n, t, heads, d] of positions, int32 [t]."""
    slots = positions % self.keys.values.shape[1]
    return KeyValues(
      self.keys.write(slots, key), self.values.write(slots, value)
    )

  def read(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """All keys and values, [n, length, heads, d]."""
    return self.keys.read(dtype), self.values.read(dtype)


class Cache(NamedTuple):
  """What a decoder keeps of the tokens so far, as one pytree of arrays.

  Attributes:
    positions: int32 [length], which position each slot holds; -1 for none.
    seen: int32 [], number of tokens so far.
    layers: keys and values of each block.
  """

  positions: jax.Array
  seen: jax.Array
  layers: tuple[KeyValues, ...]

  @classmethod
  def empty(
    cls, depth: int, shape: tuple[int, int, int, int], dtype: DTypeLike
  ) -> Cache:
    """A cache of no tokens; each of `depth` layers [n, length, heads, d]."""
    return cls(
      jnp.full(shape[1], -1, jnp.int32),
      jnp.int32(0),
      tuple(
        KeyValues(Rows.zeros(shape, dtype), Rows.zeros(shape, dtype))
        for _ in range(depth)
      ),
    )

  def extended(self, count: int) -> tuple[jax.Array, Cache]:
    """Takes slots for more tokens; returns their positions and the cache."""
    new = self.seen + jnp.arange(count, dtype=jnp.int32)
    held = self.positions.at[new % len(self.positions)].set(new)
    return new, self._replace(positions=held, seen=self.seen + count)

  def mask(self, positions: jax.Array) -> jax.Array:
    """Which slots tokens at `positions`, int32 [t], see: bool [t, length]."""
    held, own = self.positions[None], positions[:, None]
    return (held >= 0) & (held <= own)

  @property
  def nbytes(self) -> int:
    """Bytes of keys and values, with their scales."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))
