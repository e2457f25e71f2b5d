"""Plain Flax NNX networks; they know nothing of quantization."""

import inspect
import typing
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dr_jax.models.blocks import check_integer
from dr_jax.models.imagenet_resnet import (
  ImageNetResNet,
  resnet18,
  resnet34,
  resnet50,
)
from dr_jax.models.mobilenet import MobileNetV2
from dr_jax.models.resnet import ResNet, resnet20, resnet32, resnet44, resnet56
from dr_jax.models.transformer import Transformer
from dr_jax.models.vit import ViT, vit_small, vit_tiny

__all__ = [
  "NAMES",
  "TASKS",
  "ImageNetResNet",
  "MobileNetV2",
  "ResNet",
  "Transformer",
  "ViT",
  "build",
  "options_of",
  "resnet18",
  "resnet20",
  "resnet32",
  "resnet34",
  "resnet44",
  "resnet50",
  "resnet56",
  "vit_small",
  "vit_tiny",
]

_CLASSIFIERS = {
  "resnet": ResNet,
  "resnet20": resnet20,
  "resnet32": resnet32,
  "resnet44": resnet44,
  "resnet56": resnet56,
  "resnet18": resnet18,
  "resnet34": resnet34,
  "resnet50": resnet50,
  "mobilenetv2": MobileNetV2,
  "vit": ViT,
  "vit_tiny": vit_tiny,
  "vit_small": vit_small,
}
_LANGUAGE_MODELS = {"transformer": Transformer}
_FACTORIES = _CLASSIFIERS | _LANGUAGE_MODELS

NAMES = tuple(_FACTORIES)
# Names of networks by the task that they are for.
TASKS = {
  "classification": tuple(_CLASSIFIERS),
  "language": tuple(_LANGUAGE_MODELS),
}
# Options that size what networks read and return, and their largest values.
_SIZES = {"num_classes": 10**6, "channels": 1024}
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def build(name: str, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
  """Builds a network by its registered name.

  Args:
    name: one of `NAMES`.
    rngs: source of initial weights.
    **options: arguments of that network. All take dtype, the type in which
      they compute; classifiers num_classes and channels, those that are made
      for images of one size image_size; language models vocabulary and context.

  Raises:
    ValueError: for an unknown name, an option that the network does not have,
      a value that it does not allow, or a dtype in which it cannot compute.

  >>> build("resnet20", rngs=nnx.Rngs(0), depth=8)
  Traceback (most recent call last):
  ValueError: options of model 'resnet20' must be of num_classes, ...
  """
  known = options_of(name)
  for option in options:
    if option not in known:
      raise ValueError(
        f"options of model {name!r} must be of {', '.join(known)}, got "
        f"{option!r}"
      )
  for option, most in _SIZES.items():
    if option in options:
      check_integer(option, options[option], 1, most)
  _check_dtype(options.get("dtype", jnp.float32))
  try:
    return _FACTORIES[name](rngs=rngs, **options)
  except TypeError as error:
    raise ValueError(f"options of model {name!r}: {error}") from None


def options_of(name: str) -> list[str]:
  """Returns the options of a network by its registered name.

  Raises:
    ValueError: for an unknown name.

  >>> options_of("mobilenetv2")
  ['num_classes', 'width', 'channels', 'dtype']
  """
  if name not in _FACTORIES:
    known = ", ".join(NAMES)
    raise ValueError(f"name must be one of {known}, got {name!r}")
  factory: Any = _FACTORIES[name]
  # A depth is an option unless the name says it.
  network, taken = factory, ("self", "rngs")
  if not isinstance(factory, type):
    network = typing.get_type_hints(factory)["return"]
    taken = ("self", "rngs", "depth")
  names = inspect.signature(network.__init__).parameters
  return [name for name in names if name not in taken]


def _check_dtype(dtype: Any) -> None:
  try:
    known = jnp.dtype(dtype).name in _DTYPES
  except (TypeError, ValueError):
    known = False
  if not known:
    raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
