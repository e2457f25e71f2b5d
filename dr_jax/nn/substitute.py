"""Swaps modules of a network by identity; copies what a module holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx


def substitute(
  model: nnx.Module, replacements: Mapping[int, nnx.Module]
) -> Any:
  """Swaps modules in place; returns the root, which may be swapped itself.

  Args:
    model: the network.
    replacements: {id of a module: what replaces it}.
  """

  def swap(value):
    if id(value) in replacements:
      return replacements[id(value)]
    if type(value) is dict:
      items = {key: swap(item) for key, item in value.items()}
      same = all(items[key] is value[key] for key in value)
      return value if same else items
    if type(value) is list or isinstance(value, tuple):
      items = [swap(item) for item in value]
      same = all(a is b for a, b in zip(items, value, strict=True))
      if same:
        return value
      make = getattr(type(value), "_make", type(value))
      return make(items)
    return value

  for _, node in list(nnx.iter_graph(model)):
    if not isinstance(node, nnx.Pytree):
      continue
    for name, value in list(vars(node).items()):
      swapped = value if name.startswith("_pytree") else swap(value)
      if swapped is not value:
        setattr(node, name, nnx.data(swapped))
  return swap(model)


def copy_attributes(
  module: Any, source: nnx.Module, *, omit: Sequence[str] = ()
) -> None:
  """Gives `module` the attributes of `source`, including its variables."""
  for name, value in vars(source).items():
    if not name.startswith("_pytree") and name not in omit:
      setattr(module, name, nnx.data(value) if _holds_data(value) else value)


def _holds_data(value):
  """Whether a plain container holds variables, modules or arrays."""
  if not isinstance(value, dict | list | tuple):
    return False
  return any(map(nnx.is_data, jax.tree.leaves(value, is_leaf=nnx.is_data)))
