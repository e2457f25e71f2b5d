"""Flax Linen layers as the NNX layers that compute the same.

Both Flax interfaces share names of parameters, their shapes and the functions
that compute with them, so that a layer of one can stand for one of the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

# Fields that change how a layer computes, where they are set.
_OWN_COMPUTATION = (
  "dot_general",
  "dot_general_cls",
  "conv_general_dilated",
  "conv_general_dilated_cls",
)


class Twin(NamedTuple):
  """How an NNX layer stands for a Linen layer.

  Attributes:
    make: make(layer, x, rngs), the NNX layer for a bound Linen layer and the
      input of a call.
    methods: those that it takes over.
  """

  make: Callable[[Any, jax.Array, nnx.Rngs], nnx.Module]
  methods: tuple[str, ...] = ("__call__",)


def _fields(layer, *names):
  return {name: getattr(layer, name) for name in names}


def _dense(layer, x, rngs):
  options = _fields(layer, "use_bias", "dtype", "param_dtype", "precision")
  return nnx.Linear(x.shape[-1], layer.features, rngs=rngs, **options)


def _conv(layer, x, rngs):
  options = _fields(
    layer,
    *("strides", "padding", "input_dilation", "kernel_dilation"),
    *("feature_group_count", "use_bias", "mask"),
    *("dtype", "param_dtype", "precision"),
  )
  size = layer.kernel_size
  return nnx.Conv(x.shape[-1], layer.features, size, rngs=rngs, **options)


def _conv_transpose(layer, x, rngs):
  options = _fields(
    layer,
    *("strides", "padding", "kernel_dilation", "use_bias", "mask"),
    *("dtype", "param_dtype", "precision", "transpose_kernel"),
    "preferred_element_type",
  )
  return nnx.ConvTranspose(
    x.shape[-1], layer.features, layer.kernel_size, rngs=rngs, **options
  )


def _dense_general(layer, x, rngs):
  axes = _as_tuple(layer.axis)
  options = _fields(layer, "use_bias", "dtype", "param_dtype", "precision")
  return nnx.LinearGeneral(
    tuple(x.shape[axis] for axis in axes),
    layer.features,
    axis=layer.axis,
    batch_axis={axis: x.shape[axis] for axis in _as_tuple(layer.batch_dims)},
    rngs=rngs,
    **options,
  )


def _einsum(layer, x, rngs):
  del x
  bias = layer.get_variable("params", "bias") if layer.use_bias else None
  options = _fields(
    layer, "dtype", "param_dtype", "precision", "preferred_element_type"
  )
  return nnx.Einsum(
    layer.einsum_str,
    tuple(layer.shape),
    None if bias is None else bias.shape,
    rngs=rngs,
    **options,
  )


def _embed(layer, x, rngs):
  del x
  options = _fields(layer, "dtype", "param_dtype")
  return nnx.Embed(layer.num_embeddings, layer.features, rngs=rngs, **options)


def _batch_norm(layer, x, rngs):
  options = _fields(
    layer,
    *("axis", "momentum", "epsilon", "dtype", "param_dtype", "use_bias"),
    *("use_scale", "axis_name", "axis_index_groups", "use_fast_variance"),
  )
  return nnx.BatchNorm(x.shape[layer.axis], rngs=rngs, **options)


TWINS: dict[type, Twin] = {
  linen.Dense: Twin(_dense),
  linen.Conv: Twin(_conv),
  linen.ConvTranspose: Twin(_conv_transpose),
  linen.DenseGeneral: Twin(_dense_general),
  linen.Einsum: Twin(_einsum),
  linen.Embed: Twin(_embed, methods=("__call__", "attend")),
  linen.BatchNorm: Twin(_batch_norm),
}


def twin_of(layer: linen.Module) -> Twin | None:
  """The entry of a layer that computes as one of the table does.

  That is one of these types, or a subclass that overrides none of the methods,
  with no functions of its own for its product or its dtypes.
  """
  kind = type(layer)
  base: Any = next((t for t in kind.__mro__ if t in TWINS), None)
  if base is None:
    return None
  twin = TWINS[base]
  if any(getattr(kind, m) is not getattr(base, m) for m in twin.methods):
    return None
  defaults = {field.name: field.default for field in dataclasses.fields(base)}
  if any(getattr(layer, name, None) is not None for name in _OWN_COMPUTATION):
    return None
  for name in ("promote_dtype", "force_float32_reductions"):
    if name in defaults and getattr(layer, name) != defaults[name]:
      return None
  if base is linen.Einsum and layer.einsum_str is None:
    return None
  return twin


def _as_tuple(value):
  return tuple(value) if isinstance(value, list | tuple) else (value,)
