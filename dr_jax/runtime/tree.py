"""Pytrees of arrays; leaves by slash paths, as stage1/conv1/kernel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns {slash path: leaf}, in the order of `jax.tree.leaves`.

  The path of a tree that is a leaf itself is "".

  Raises:
    ValueError: if two leaves have the same path, as {"a/b": x, "a": {"b": y}}.

  >>> named_leaves({"conv": {"kernel": 1, "bias": 2}})
  {'conv/bias': 2, 'conv/kernel': 1}
  """
  named = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in named:
      raise ValueError(f"{name}: two leaves have the same path")
    named[name] = leaf
  return named


def array_bytes(tree: Any) -> int:
  """Returns the bytes of all arrays, or of what has their shape and dtype.

  >>> array_bytes({"a": np.zeros((2, 3), np.float32), "b": np.int8(1)})
  25
  """
  leaves = jax.tree.leaves(tree)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def stack(trees: Sequence[Any]) -> Any:
  """Returns one tree of arrays [trees, ...] for equal trees of arrays.

  >>> stack([{"a": jnp.int32(1)}, {"a": jnp.int32(2)}])["a"].tolist()
  [1, 2]
  """
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def fingerprint(tree: Any) -> str:
  """Returns a SHA-256 of all arrays: paths, dtypes, shapes and bytes.

  Args:
    tree: pytree of arrays, such as (params, batch_stats).

  >>> fingerprint({"a": np.zeros(2)})[:8]
  '1223ace7'
  """
  digest = hashlib.sha256()
  for path, leaf in named_leaves(tree).items():
    leaf = np.asarray(leaf)
    header = json.dumps([path, str(leaf.dtype), leaf.shape])
    digest.update(header.encode() + leaf.tobytes())
  return digest.hexdigest()
