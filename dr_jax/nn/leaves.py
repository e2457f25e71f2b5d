"""The leaves of a network's state: variables, or plain arrays in a module.

Flax keeps a jax.Array or numpy array that is an attribute of a module (a mask,
a table of positions) as a leaf of its own. Here both are read and replaced
alike; a plain array travels with the state that is not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Leaves = list[tuple[tuple[Any, ...], Any]]


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
