"""Tests of manifests and checksums; tests/checkpoint_test.py has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dr_jax.checkpoint.snapshot import Snapshot, checksums, unsealed


def checksum(array):
  saved = unsealed(Snapshot({"a": array}).manifest())["a"]["sum32"]
  assert checksums({"a": array}) == {"a": saved}
  return saved


def test_a_checksum_is_the_same_however_an_array_is_spread():
  mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  for dtype in ("float32", "bfloat16", "int8", "uint32", "bool"):
    values = jnp.arange(48).reshape(4, 12).astype(dtype)
    spread = jax.device_put(values, NamedSharding(mesh, P(None, "x")))
    sums = [checksum(a) for a in (values, spread)]
    assert sums[0] == sums[1] != 0
    changed = values.at[2, 5].set((~values[2, 5].astype(bool)).astype(dtype))
    assert checksum(changed) != sums[0]
    if dtype != "bool":
      exchanged = values.at[0, 3].set(values[3, 0]).at[3, 0].set(values[0, 3])
      assert checksum(exchanged) != sums[0]


def test_the_highest_bit_of_any_element_changes_a_checksum():
  """An even factor would lose it."""
  zeros = jnp.zeros((2, 3), jnp.uint32)
  sums = {
    checksum(zeros.at[at].set(jnp.uint32(1 << 31)))
    for at in np.ndindex(zeros.shape)
  }
  assert sums == {1 << 31}
  assert checksum(zeros) == 0


@pytest.mark.parametrize("manifest", [None, 3, "x", [], {}, {"leaves": {}}])
def test_a_file_that_is_not_a_manifest_is_damage(manifest):
  assert unsealed(manifest) is None
