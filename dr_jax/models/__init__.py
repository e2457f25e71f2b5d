"""Plain Flax NNX networks; they know nothing of quantization."""

from typing import Any

from flax import nnx

from dr_jax.models.resnet import ResNet, resnet20, resnet32, resnet44, resnet56

__all__ = [
  "NAMES",
  "ResNet",
  "build",
  "resnet20",
  "resnet32",
  "resnet44",
  "resnet56",
]

_FACTORIES = {
  "resnet": ResNet,
  "resnet20": resnet20,
  "resnet32": resnet32,
  "resnet44": resnet44,
  "resnet56": resnet56,
}

NAMES = tuple(_FACTORIES)


def build(name: str, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
  """Builds a network by its registered name.

  Args:
    name: one of `NAMES`.
    rngs: source of initial weights.
    **options: arguments of that network.

  Raises:
    ValueError: for an unknown name or an option that the network does not have.
  """
  if name not in _FACTORIES:
    raise ValueError(f"model {name!r}: allowed are {', '.join(NAMES)}")
  try:
    return _FACTORIES[name](rngs=rngs, **options)
  except TypeError as error:
    raise ValueError(f"options of model {name!r}: {error}") from None
