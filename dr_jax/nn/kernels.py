"""Kernels as methods see them: normalized by a wrapper, masked, in columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from dr_jax.nn.contraction import base_of, contraction_of
from dr_jax.nn.substitute import copy_attributes

# Wrappers that take every parameter of a layer, also a quantizer's, for one of
# the float layer.
FLOAT_WRAPPERS = (nnx.SpectralNorm,)


def computed_kernels(model: nnx.Module) -> dict[int, jax.Array]:
  """Returns {id of a layer: the kernel that reaches its computation}.

  That is the kernel after the nnx.WeightNorm around it, if there is one, times
  the mask of a convolution, with its output channels as the last axis
  (`contraction.Columns`), after the axes of a stack. It is what scales are
  chosen for and codes stored of.

  Args:
    model: a network, float or quantized; it is not changed.
  """
  modules = [module for _, module in nnx.iter_modules(model)]
  copies = modules
  if any(isinstance(module, nnx.WeightNorm) for module in modules):
    copies = [module for _, module in nnx.iter_modules(nnx.clone(model))]
    for copy in copies:
      if isinstance(copy, nnx.WeightNorm):
        _normalize(copy)
  return {
    id(module): _columns(copy)
    for module, copy in zip(modules, copies, strict=True)
    if _has_kernel(copy)
  }


def inside_float_wrappers(model: nnx.Module) -> dict[int, str]:
  """Returns {id of a module: name of the wrapper that keeps it float}."""
  return {
    id(inner): type(module).__name__
    for _, module in nnx.iter_modules(model)
    if isinstance(module, FLOAT_WRAPPERS)
    for _, inner in nnx.iter_modules(module)
    if inner is not module
  }


def check_kernels(found: Mapping[str, Any]) -> None:
  """Raises ValueError for the first layer with a NaN or infinite weight."""
  for name, layer in found.items():
    # In numpy: a program for each shape would take longer to compile.
    bad = int((~np.isfinite(np.asarray(kernel_of(layer)[...]))).sum())
    if bad:
      raise ValueError(
        f"weight of layer {name!r} must be finite, but {bad} values are NaN or "
        "infinite"
      )


def kernel_of(layer: nnx.Module) -> Any:
  """The kernel of a layer that `CONTRACTIONS` knows."""
  return getattr(layer, contraction_of(layer).kernel)


def _has_kernel(layer):
  known = base_of(layer) is not None
  return known and isinstance(kernel_of(layer), nnx.Variable)


def _columns(layer):
  contraction = contraction_of(layer)
  kernel, mask = kernel_of(layer)[...], getattr(layer, "mask", None)
  of = contraction.columns(layer).of
  for _ in contraction.stack(layer):
    of = jax.vmap(of)
  return of(kernel if mask is None else kernel * mask)


def _normalize(wrapper):
  """Does what a call of the wrapper does to its kernels, and no more."""
  inner = wrapper.layer_instance
  kind: Any = type(inner)

  class Silent(kind):
    def __init__(self):
      copy_attributes(self, inner)

    def __call__(self, *args, **kwargs):
      return None

  wrapper.layer_instance = Silent()
  wrapper(None)
  wrapper.layer_instance = inner
