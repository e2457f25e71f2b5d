"""Tests of names and fingerprints of a tree's leaves."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.runtime.tree import fingerprint, named_leaves


class State(NamedTuple):
  count: int
  moments: tuple[int, int]


def test_leaves_are_named_by_their_paths_in_the_order_of_jax():
  tree = {"b": State(1, (2, 3)), "a": {"x": 4}, "none": None, "list": [5]}
  named = named_leaves(tree)
  assert named == {
    "a/x": 4,
    "b/count": 1,
    "b/moments/0": 2,
    "b/moments/1": 3,
    "list/0": 5,
  }
  assert list(named.values()) == jax.tree.leaves(tree)
  assert named_leaves(7) == {"": 7}


def test_two_leaves_with_one_path_are_an_error():
  with pytest.raises(ValueError, match="^a/b: two leaves have the same path"):
    named_leaves({"a/b": 1, "a": {"b": 2}})


def test_a_fingerprint_is_the_published_one():
  # A change here makes stored traces those of another network.
  tree = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}
  assert fingerprint(tree) == (
    "bb105696b10199cb70439fa43d9f15e9619758f1a3faf5e2e4d4ead19cd48b21"
  )
  assert fingerprint(jax.tree.map(np.asarray, tree)) == fingerprint(tree)


@pytest.mark.parametrize(
  "other",
  [
    {"a": np.array([1.0, 2.0], np.float32), "b": np.zeros(3, np.int32)},
    {"a": np.array([1.0, 2.0]), "c": np.zeros(3, np.int32)},
    {"a": np.array([1.0, 2.0]), "b": np.zeros((3, 1), np.int32)},
    {"a": np.array([1.0, 2.0]), "b": np.zeros(3, np.float32)},
    {"a": np.array([1.0, np.nextafter(2.0, 3.0)]), "b": np.zeros(3, np.int32)},
  ],
  ids=["dtype", "path", "shape", "zeros of another dtype", "last bit"],
)
def test_a_fingerprint_depends_on_paths_dtypes_shapes_and_bits(other):
  tree = {"a": np.array([1.0, 2.0]), "b": np.zeros(3, np.int32)}
  assert fingerprint(tree) == fingerprint(dict(reversed(tree.items())))
  assert fingerprint(other) != fingerprint(tree)
