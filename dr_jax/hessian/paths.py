"""Names of the leaves of a pytree: slash paths, as stage1/conv1/kernel."""

from __future__ import annotations

from typing import Any

import jax


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
  """Returns {slash path: leaf}, in the order of the tree, and its structure.

  The path of a tree that is a leaf itself is "".

  Raises:
    ValueError: if two leaves have one path, as {"a/b": x, "a": {"b": y}}.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  named = {}
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in named:
      raise ValueError(f"{name}: two leaves; allowed is one leaf per path")
    named[name] = leaf
  return named, structure
