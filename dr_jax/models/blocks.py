"""What the networks share: convolutions and norms as PyTorch's, and stages."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

# torchvision's start of a convolution: arXiv 1502.01852, by its outputs.
FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
  c_in: int,
  c_out: int,
  size: int,
  stride: int = 1,
  *,
  groups: int = 1,
  kernel_init: nnx.Initializer = FAN_OUT,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """A convolution without bias, padded by half its size on every side."""
  return nnx.Conv(
    c_in,
    c_out,
    (size, size),
    strides=stride,
    padding=size // 2,
    feature_group_count=groups,
    use_bias=False,
    kernel_init=kernel_init,
    dtype=dtype,
    rngs=rngs,
  )


def norm(features: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.BatchNorm:
  """Batch norm with torch's momentum, 0.1 in its own terms, and epsilon."""
  return nnx.BatchNorm(
    features, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs
  )


def check_integer(name: str, value: object, low: int, high: int) -> None:
  """Raises ValueError unless a size of a network is an integer in a range.

  Before any layer is built: a depth of 10^9 would take forever.
  """
  if isinstance(value, bool) or not (
    isinstance(value, int) and low <= value <= high
  ):
    raise ValueError(
      f"{name} must be an integer in {low}..{high}, got {value!r}"
    )


class Stage(nnx.Module):
  """Blocks in a row, named block0, block1, ..."""

  def __init__(self, blocks: Sequence[nnx.Module]):
    self.depth = len(blocks)
    for number, block in enumerate(blocks):
      setattr(self, f"block{number}", block)

  def __call__(self, x: jax.Array) -> jax.Array:
    for number in range(self.depth):
      x = getattr(self, f"block{number}")(x)
    return x
