"""The arguments of one call of a model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


@jax.tree_util.register_pytree_node_class
class Inputs:
  """Positional and keyword arguments of one call of a model.

  A pytree: its arrays are traced by a transformation, all else (flags, None)
  is static.

  >>> Inputs(np.ones((2, 3)), deterministic=True).kwargs
  {'deterministic': True}
  """

  def __init__(self, *args: Any, **kwargs: Any):
    self.args, self.kwargs = args, kwargs

  @classmethod
  def of(cls, batch: Any) -> Inputs:
    """Inputs as they are, a tuple as all positional arguments, else the one."""
    if isinstance(batch, cls):
      return batch
    return cls(*batch) if isinstance(batch, tuple) else cls(batch)

  def tree_flatten(self):
    leaves, structure = jax.tree.flatten((self.args, self.kwargs))
    static = tuple(None if _is_array(leaf) else (leaf,) for leaf in leaves)
    return [leaf for leaf in leaves if _is_array(leaf)], (structure, static)

  @classmethod
  def tree_unflatten(cls, aux, children):
    structure, static = aux
    rest = iter(children)
    leaves = [next(rest) if kept is None else kept[0] for kept in static]
    args, kwargs = jax.tree.unflatten(structure, leaves)
    return cls(*args, **kwargs)

  @property
  def examples(self) -> int:
    """Size of the batch axis.

    Of several positional arrays the one with most axes is the batch: a table
    has fewer. Those given by keyword count only where there is no other.

    Raises:
      ValueError: if there is no array with a batch axis, or no example.
    """
    found = _batches(self.args) or _batches(self.kwargs)
    if not found:
      raise ValueError(
        f"sample must be arrays [batch, ...], got {self.args or self.kwargs!r}"
      )
    examples = len(max(found, key=lambda array: array.ndim))
    if not examples:
      raise ValueError("sample must be arrays [batch, ...], got no example")
    return examples


def _batches(arguments):
  leaves = jax.tree.leaves(arguments)
  return [leaf for leaf in leaves if _is_array(leaf) and leaf.ndim]


def _is_array(x):
  return isinstance(x, jax.Array | np.ndarray)
