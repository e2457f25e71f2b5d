"""Partition specs of what belongs to an annotated kernel or norm.

`nnx.with_partitioning` says over which axes of a mesh the axes of a kernel are
spread. A scale is spread as its channels are, a code as its weight, a row of a
norm as its features; `nnx.get_partition_spec` returns them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx

from dr_jax.nn.contraction import Columns

Spec = tuple[Any, ...]
_KEY = "out_sharding"


def spec_of(variable: nnx.Variable | None) -> Spec | None:
  """Axes of a mesh for the axes of a variable, if it is annotated."""
  if variable is None:
    return None
  return variable.get_metadata(_KEY, None)


def columns_spec(
  spec: Spec | None, columns: Columns, stack: int
) -> Spec | None:
  """The spec of a kernel's columns, after those of the axes of a stack.

  Axes that are made one are spread as the first of them, if that alone is.

  >>> columns = Columns.ending_in((1, 2), (8, 2, 3), flat=True)
  >>> columns_spec((None, "model", None), columns, 0)
  (None, 'model')
  """
  if spec is None:
    return None
  groups = columns.grouped(spec[stack:])
  return (*spec[:stack], *map(_of_joined, groups))


def _of_joined(names):
  first, *rest = names or [None]
  return None if any(rest) else first


def annotate(
  variable: nnx.Variable, spec: Spec | None, shape: Sequence[int]
) -> None:
  """Gives a variable the spec of an array whose axes its last ones follow.

  An axis of length 1 is not spread; a variable with others has no spec.

  Args:
    variable: what is annotated, in place.
    spec, shape: of the array.
  """
  if spec is None or variable.ndim < len(shape):
    return
  extra = variable.ndim - len(shape)
  pairs = list(zip(variable.shape[extra:], shape, strict=True))
  if all(own in (1, size) for own, size in pairs):
    names = [
      name if own > 1 else None
      for name, (own, _) in zip(spec, pairs, strict=True)
    ]
    variable.set_metadata(_KEY, (*(None,) * extra, *names))
