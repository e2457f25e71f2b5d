"""Plain Flax NNX networks; they know nothing of quantization."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dr_jax.models.imagenet_resnet import (
  ImageNetResNet,
  resnet18,
  resnet34,
  resnet50,
)
from dr_jax.models.mobilenet import MobileNetV2
from dr_jax.models.resnet import ResNet, resnet20, resnet32, resnet44, resnet56
from dr_jax.models.torchvision import load_torchvision

__all__ = [
  "NAMES",
  "ImageNetResNet",
  "MobileNetV2",
  "ResNet",
  "build",
  "load_torchvision",
  "resnet18",
  "resnet20",
  "resnet32",
  "resnet34",
  "resnet44",
  "resnet50",
  "resnet56",
]

_FACTORIES = {
  "resnet": ResNet,
  "resnet20": resnet20,
  "resnet32": resnet32,
  "resnet44": resnet44,
  "resnet56": resnet56,
  "resnet18": resnet18,
  "resnet34": resnet34,
  "resnet50": resnet50,
  "mobilenetv2": MobileNetV2,
}

NAMES = tuple(_FACTORIES)
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def build(name: str, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
  """Builds a network by its registered name.

  Args:
    name: one of `NAMES`.
    rngs: source of initial weights.
    **options: arguments of that network; all take num_classes, channels, and
      dtype, the type in which they compute.

  Raises:
    ValueError: for an unknown name, an option that the network does not have,
      or a dtype in which it cannot compute.
  """
  if name not in _FACTORIES:
    known = ", ".join(NAMES)
    raise ValueError(f"name must be one of {known}, got {name!r}")
  try:
    dtype = jnp.dtype(options.get("dtype", jnp.float32)).name
    if dtype not in _DTYPES:
      raise TypeError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
    return _FACTORIES[name](rngs=rngs, **options)
  except TypeError as error:
    raise ValueError(f"options of model {name!r}: {error}") from None
