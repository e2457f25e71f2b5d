"""What a checkpoint holds: the arrays of a state, and a manifest of them.

A state is one flat dictionary {"params/conv1/kernel": array, ...}, with the
data of typed PRNG keys in their place. The manifest has shape, dtype and
checksum of each array, and its own checksum.
"""

from __future__ import annotations

import collections
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dr_jax.runtime.tree import named_leaves


class Snapshot:
  """A copy of a state on its devices, which can be saved later.

  The devices make copies and checksums asynchronously. Nothing waits for them
  before `Checkpoints.save`, and the buffers of the state may be donated right
  away.
  """

  def __init__(self, state: Any):
    """Copies a state.

    Args:
      state: nested dicts with string keys, tuples and named tuples of
        `jax.Array`s, typed PRNG keys among them.

    Raises:
      TypeError: if a leaf is not a `jax.Array`.
      ValueError: if two leaves have the same path.
    """
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
      if not isinstance(leaf, jax.Array):
        raise TypeError(
          f"{name} is of type {type(leaf).__name__}, but must be a jax.Array"
        )
    self._saved = {
      name: {
        **_spec(leaf),
        "key_impl": str(jax.random.key_impl(leaf)) if _is_key(leaf) else None,
      }
      for name, leaf in leaves.items()
    }
    taken = _by_devices(_copies_and_sums, key_data(leaves))
    self.arrays = {name: array for name, (array, _) in taken.items()}
    self._sums = {name: number for name, (_, number) in taken.items()}

  def manifest(self) -> dict[str, Any]:
    """Returns the manifest; waits for the checksums."""
    sums = jax.device_get(self._sums)
    return _seal(
      {
        name: spec | {"sum32": int(sums[name])}
        for name, spec in self._saved.items()
      }
    )


def _seal(leaves):
  """Returns a manifest of entries by leaf, with its checksum."""
  text = json.dumps(leaves, sort_keys=True)
  return {"leaves": leaves, "crc32": zlib.crc32(text.encode())}


def unsealed(manifest: Any) -> dict[str, Any] | None:
  """Returns the entries of a manifest by leaf, or None if it is damaged."""
  if not isinstance(manifest, dict):
    return None
  leaves = manifest.get("leaves")
  return leaves if manifest == _seal(leaves) else None


def difference(
  saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> str | None:
  """Describes the first difference of a saved state from a wanted one, or None.

  Args:
    saved: entries of a manifest by leaf.
    wanted: {name: leaf}.
  """
  for name in [*wanted, *saved]:
    if name not in saved:
      return f"it lacks {name}"
    if name not in wanted:
      return f"it has {name}, which is not asked for"
    one, other = saved[name], _spec(wanted[name])
    if one["dtype"] != other["dtype"] or one["shape"] != other["shape"]:
      return (
        f"{name} is {one['dtype']}{one['shape']},"
        f" not {other['dtype']}{other['shape']}"
      )
  return None


def _spec(leaf):
  return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _is_key(leaf):
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf):
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def key_data(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Replaces typed PRNG keys by their data, {name: array}."""
  return {name: _key_data(leaf) for name, leaf in leaves.items()}


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """Returns {name: checksum}; waits for the devices.

  Args:
    arrays: {name: array}.
  """
  sums = jax.device_get(_by_devices(_sums, arrays))
  return {name: int(number) for name, number in sums.items()}


def _by_devices(program, arrays):
  """Calls a program with the arrays of each set of devices.

  Args:
    program: {name: array} -> {name: anything}; JAX compiles none that takes
      arrays of different devices.
    arrays: {name: array}.
  """
  groups: dict[Any, dict[str, jax.Array]] = collections.defaultdict(dict)
  for name, array in arrays.items():
    groups[frozenset(array.sharding.device_set)][name] = array
  results: dict[str, Any] = {}
  for group in groups.values():
    results |= program(group)
  return results


@jax.jit
def _copies_and_sums(arrays):
  return {
    name: (jnp.copy(array), _sum(array)) for name, array in arrays.items()
  }


@jax.jit
def _sums(arrays):
  return {name: _sum(array) for name, array in arrays.items()}


def _sum(array):
  """A checksum: any one changed element changes it.

  An integer modulo 2^32, so that it depends neither on the order of the sum nor
  on how an array is sharded over devices and processes.
  """
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  width = min(array.dtype.itemsize, 4)
  words = jax.lax.bitcast_convert_type(array, f"uint{8 * width}")
  total = jnp.zeros(words.shape, jnp.uint32)
  # Odd factors, different for neighbors: no two elements may change places.
  for axis, size in enumerate(words.shape):
    shape = [size if a == axis else 1 for a in range(words.ndim)]
    position = jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    total = total * jnp.uint32(0x01000193) + position
  factors = total * jnp.uint32(2) + jnp.uint32(1)
  return (words.astype(jnp.uint32) * factors).sum(dtype=jnp.uint32)
