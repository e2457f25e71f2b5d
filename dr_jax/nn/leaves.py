"""The leaves of a network's state: variables, or plain arrays in a module.

Flax keeps a jax.Array or numpy array that is an attribute of a module (a mask,
a table of positions) as a leaf of its own. Here both are read and replaced
alike; a plain array travels with the state that is not trained.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Leaves = list[tuple[tuple[Any, ...], Any]]
# Nested dicts of arrays by the parts of their paths, as strings.
Tree = dict[str, Any]


def split_leaves(
  model: nnx.Module, *filters: Any
) -> tuple[nnx.GraphDef, list[Leaves]]:
  """Splits a network as `nnx.split` does, into flat lists (path, leaf).

  What `nnx.sow` and `nnx.capture` left in a module does not belong to it.

  Args:
    model: the network; it is not changed.
    filters: as in `nnx.split`; together they must match every leaf.
  """
  model = nnx.clone(model)
  nnx.pop(model, nnx.Intermediate)
  graph, *states = nnx.split(model, *filters)
  return graph, [list(nnx.to_flat_state(state)) for state in states]


def value_of(leaf: Any) -> jax.Array:
  """The array of a leaf."""
  if isinstance(leaf, nnx.Variable):
    return leaf.get_value()
  return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def with_value(leaf: Any, value: Any) -> Any:
  """The leaf with another array."""
  return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def name_of(path: Sequence[Any]) -> str:
  """The slash path of a leaf."""
  return "/".join(map(str, path))


def nested(items: Iterable[tuple[Sequence[Any], Any]]) -> Tree:
  """Nested dicts of pairs (path, value).

  >>> nested([(("a", 0), 1), (("a", "b"), 2)])
  {'a': {'0': 1, 'b': 2}}
  """
  tree: Tree = {}
  for path, value in items:
    *parents, last = map(str, path)
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def item_at(tree: Any, path: Iterable[Any]) -> Any:
  """What a tree has at a path.

  >>> item_at({"a": {"0": 1}}, ("a", 0))
  1
  """
  return functools.reduce(operator.getitem, map(str, path), tree)


def filled(leaves: Leaves, tree: Mapping[str, Any], prefix: str = "") -> Leaves:
  """Returns leaves with the arrays that a tree has at their paths.

  Raises:
    ValueError: if an array is missing, left over or has another shape, named
      with the prefix.
  """
  found, names = [], set()
  for path, leaf in leaves:
    name = prefix + name_of(path)
    names.add(name)
    try:
      value = item_at(tree, path)
    except (KeyError, TypeError):
      raise ValueError(f"{name} must be an array, but is missing") from None
    if np.shape(value) != leaf.shape:
      raise ValueError(
        f"{name} must have shape {leaf.shape}, got {np.shape(value)}"
      )
    found.append((path, with_value(leaf, jnp.asarray(value))))
  extra = [name for name in _names(tree, prefix) if name not in names]
  if extra:
    raise ValueError(
      f"{', '.join(extra)}: not in this network; pass what it was split into"
    )
  return found


def _names(tree, prefix) -> Iterator[str]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _names(value, f"{prefix}{key}/")
    else:
      yield f"{prefix}{key}"
