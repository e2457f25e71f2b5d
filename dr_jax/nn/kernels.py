"""Kernels as layers compute with them: normalized by a wrapper, masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax.nn.substitute import copy_attributes

# Wrappers that take every parameter of a layer, also a quantizer's, for one of
# the float layer.
FLOAT_WRAPPERS = (nnx.SpectralNorm,)


def computed_kernels(model: nnx.Module) -> dict[int, jax.Array]:
  """Returns {id of a module: the kernel that reaches its computation}.

  That is the kernel after the nnx.WeightNorm around it, if there is one, times
  the mask of a convolution. It is what scales are chosen for and codes stored
  of.

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
    id(module): _masked(copy)
    for module, copy in zip(modules, copies, strict=True)
    if isinstance(getattr(copy, "kernel", None), nnx.Variable)
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
    bad = int((~jnp.isfinite(layer.kernel[...])).sum())
    if bad:
      raise ValueError(
        f"weight of layer {name!r} must be finite, but {bad} values are NaN or "
        "infinite"
      )


def _masked(layer):
  kernel, mask = layer.kernel[...], getattr(layer, "mask", None)
  return kernel if mask is None else kernel * mask


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
