"""What Linen's own jit (`flax.linen.jit`) keeps, and for which calls.

It keeps programs by the structure of the variables of a module. A program that
it has kept does not meet an interceptor again, so modules whose layers are not
the same must not share one; and it holds as constants the bits that a scan
inside it does not pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A collection that a call is given and does not return: see `marked`.
MARKS = "layers_called"

# jax.jit looks for its programs by the value of this, too.
_context = jax.make_user_context(default_value=None)
_fresh = itertools.count()


def marked(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Variables by which the modules of one call do not share programs."""
  tree: dict[str, Any] = {}
  for collection in variables.values():
    _mark(tree, collection, "at")
  return {**variables, MARKS: tree}


def own_programs() -> Any:
  """A context in which programs are kept, but none is there at the start."""
  return _context(next(_fresh))


def programs_of(graphs: int, bits: Any, jitted: bool) -> Any:
  """A context in which calls of the same layers and bits share programs.

  Args:
    graphs: a hash of the layers without their arrays.
    bits: their bits; traced ones may be any, and share nothing.
    jitted: whether there are such programs; else the context is none.
  """
  if not jitted:
    return _context(None)
  leaves = jax.tree.leaves(bits)
  if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
    return own_programs()
  return _context((graphs, str([np.asarray(leaf).tolist() for leaf in leaves])))


def _mark(tree, variables, name):
  tree[name] = jnp.zeros(())
  for key, value in variables.items():
    if isinstance(value, Mapping):
      _mark(tree.setdefault(key, {}), value, f"{name}/{key}")
