"""Einsum layers that a package defines itself, as public language models do.

Such a layer has `einsum_str`, which names two operands, the input and the only
variable of the layer, whatever its attribute is called. That its call is that
einsum is not taken on trust: both are traced and compared.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class OwnEinsum(nnx.Module):
  """Stands for their types where layers are looked up by type."""


_FOUND: weakref.WeakKeyDictionary[nnx.Module, bool] = (
  weakref.WeakKeyDictionary()
)


def is_own_einsum(layer: Any) -> bool:
  """Whether a layer computes the einsum that it names, up to dtypes."""
  if not isinstance(getattr(layer, "einsum_str", None), str):
    return False
  if layer not in _FOUND:
    _FOUND[layer] = _computes_einsum(layer)
  return _FOUND[layer]


def kernel_axes(layer: Any) -> str:
  """Names of the axes of its kernel."""
  operands, _ = layer.einsum_str.split("->")
  return operands.split(",")[1].strip()


def own_kernel(layer: Any) -> str:
  """Name of the attribute that is its kernel."""
  (name,) = _variables(layer)
  return name


def with_kernel(layer: Any, name: str, kernel: jax.Array) -> Any:
  """A layer as its own class is to see it, with another kernel."""
  return _Seen(layer, name, kernel)


class _Seen:
  """A layer as its class sees it during one call."""

  def __init__(self, layer, name, kernel):
    self._layer = layer
    setattr(self, name, nnx.Param(kernel))

  def __getattr__(self, name):
    return getattr(self._layer, name)


def _variables(layer):
  return [k for k, v in vars(layer).items() if isinstance(v, nnx.Variable)]


def _computes_einsum(layer):
  text, names = layer.einsum_str, _variables(layer)
  form = re.fullmatch(r"([^,]+),\s*([a-zA-Z]+)\s*->.+", text)
  if form is None or len(names) != 1:
    return False
  inputs, axes = form.groups()
  array = getattr(layer, names[0])[...]
  shape = array.shape[array.ndim - len(axes) :]
  if len(shape) < len(axes):
    return False
  sizes = dict(zip(axes, shape, strict=True))
  x = [sizes.get(axis, 2) for axis in inputs if axis.isalpha()]
  operands = (
    jax.ShapeDtypeStruct(tuple(x), array.dtype),
    jax.ShapeDtypeStruct(shape, array.dtype),
  )
  call = jax.make_jaxpr(
    lambda x, w: type(layer).__call__(with_kernel(layer, names[0], w), x)
  )
  einsum = jax.make_jaxpr(lambda x, w: jnp.einsum(text, x, w))
  try:
    found = call(*operands)
  except Exception:  # whatever it raises without its other arguments
    return False
  return [*_steps(found.jaxpr)] == [*_steps(einsum(*operands).jaxpr)]


def _steps(jaxpr) -> Iterator[tuple[Any, ...]]:
  """Operations of a program without casts: what, on which shapes, and how."""
  for step in jaxpr.eqns:
    if (inner := step.params.get("jaxpr")) is not None:
      yield from _steps(inner.jaxpr)
    elif (name := step.primitive.name) != "convert_element_type":
      how = [step.params.get(k) for k in ("dimension_numbers", "permutation")]
      yield name, *how, *(v.aval.shape for v in (*step.invars, *step.outvars))
