"""Pre-activation residual networks for small images.

Stem 3x3 convolution, three stages of basic blocks, the second and third
starting with stride 2, then batch norm, ReLU, global average and a linear
head. A block is BN, ReLU, conv 3x3, BN, ReLU, conv 3x3, added to its input;
where the shape changes the shortcut is a 1x1 convolution of the activated
input. arXiv 1603.05027; CIFAR widths and depths from arXiv 1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dr_jax.models.blocks import Stage, check_integer, conv, norm


class Block(nnx.Module):
  """Pre-activation basic block: [n, h, w, c_in] -> [n, h/s, w/s, c_out]."""

  def __init__(
    self,
    c_in: int,
    c_out: int,
    stride: int,
    *,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.norm1 = norm(c_in, dtype=dtype, rngs=rngs)
    self.conv1 = _conv(c_in, c_out, 3, stride, dtype, rngs)
    self.norm2 = norm(c_out, dtype=dtype, rngs=rngs)
    self.conv2 = _conv(c_out, c_out, 3, 1, dtype, rngs)
    same = c_in == c_out and stride == 1
    self.shortcut = None if same else _conv(c_in, c_out, 1, stride, dtype, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = nnx.relu(self.norm1(x))
    if self.shortcut is not None:
      x = self.shortcut(y)
    y = self.conv1(y)
    y = self.conv2(nnx.relu(self.norm2(y)))
    return x + y


class ResNet(nnx.Module):
  """Pre-activation ResNet: images [n, h, w, channels] -> float32 logits.

  Args:
    depth: 6 n + 2 for n blocks in each stage: 8, 14, 20, 32, 44, 56, ...
    num_classes: size of the logits.
    widths: channels of the three stages.
    channels: channels of the images.
    stem_stride: 1, or 2 for maps of a quarter of the pixels from the start.
    dtype: of the computation; parameters and statistics are float32.
    rngs: source of initial weights.

  Raises:
    ValueError: if depth is not 6 n + 2 in 8..1202, widths are not three in
      1..16384, or stem_stride not in 1..2.
  """

  def __init__(
    self,
    depth: int,
    *,
    num_classes: int,
    widths: Sequence[int] = (16, 32, 64),
    channels: int = 3,
    stem_stride: int = 1,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if not isinstance(depth, int) or depth not in range(8, 1203, 6):
      raise ValueError(
        f"depth must be 6 n + 2 in 8..1202, as 8, 14, 20, got {depth!r}"
      )
    blocks = (depth - 2) // 6
    if not isinstance(widths, list | tuple) or len(widths) != 3:
      raise ValueError(f"widths must be three, as 16, 32, 64, got {widths!r}")
    for width in widths:
      check_integer("widths", width, 1, 2**14)
    check_integer("stem_stride", stem_stride, 1, 2)
    self.stem = _conv(channels, widths[0], 3, stem_stride, dtype, rngs)
    c_in = widths[0]
    stages = []
    for number, width in enumerate(widths):
      stage = []
      for block in range(blocks):
        stride = 2 if number and not block else 1
        stage.append(Block(c_in, width, stride, dtype=dtype, rngs=rngs))
        c_in = width
      stages.append(stage)
    self.stage1, self.stage2, self.stage3 = map(Stage, stages)
    self.norm = norm(c_in, dtype=dtype, rngs=rngs)
    self.head = nnx.Linear(c_in, num_classes, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.stem(x)
    for stage in (self.stage1, self.stage2, self.stage3):
      x = stage(x)
    x = nnx.relu(self.norm(x))
    return self.head(x.mean((1, 2))).astype(jnp.float32)


def resnet20(**kwargs) -> ResNet:
  """The CIFAR ResNet20 (0.27 M parameters); see `ResNet` for arguments."""
  return ResNet(20, **kwargs)


def resnet32(**kwargs) -> ResNet:
  """The CIFAR ResNet32 (0.47 M parameters)."""
  return ResNet(32, **kwargs)


def resnet44(**kwargs) -> ResNet:
  """The CIFAR ResNet44 (0.66 M parameters)."""
  return ResNet(44, **kwargs)


def resnet56(**kwargs) -> ResNet:
  """The CIFAR ResNet56 (0.86 M parameters)."""
  return ResNet(56, **kwargs)


def _conv(c_in, c_out, size, stride, dtype, rngs):
  return conv(
    c_in,
    c_out,
    size,
    stride,
    kernel_init=nnx.initializers.he_normal(),
    dtype=dtype,
    rngs=rngs,
  )
