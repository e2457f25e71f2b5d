"""MobileNetV2: inverted residuals with linear bottlenecks.

Stem 3x3 convolution of stride 2, 17 inverted residuals, a 1x1 convolution,
global average and a linear head. An inverted residual expands its input with a
1x1 convolution, filters every channel alone with a 3x3 (depthwise) one, and
projects with a third, 1x1, behind which no activation follows; norms follow
all three, ReLU6 the first two. Where the shape stays, the input is added.
arXiv 1801.04381, table 2; layers and initial weights as torchvision's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dr_jax.models.blocks import conv, norm

# Expansion, channels, blocks, stride of the first one (table 2).
_STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
_STEM, _LAST = 32, 1280


class MobileNetV2(nnx.Module):
  """MobileNetV2: images [n, h, w, channels] -> float32 logits.

  There is no dropout before the head; torchvision trains with 0.2.

  Args:
    num_classes: size of the logits.
    width: factor on all channels, which are rounded to multiples of 8; above 1
      on those of the last convolution too.
    channels: channels of the images.
    dtype: of the computation; parameters and statistics are float32.
    rngs: source of initial weights.

  Raises:
    ValueError: if width is not in 0.01..100.
  """

  def __init__(
    self,
    *,
    num_classes: int = 1000,
    width: float = 1.0,
    channels: int = 3,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    number = isinstance(width, int | float) and not isinstance(width, bool)
    if not (number and 0.01 <= width <= 100):
      raise ValueError(f"width must be in 0.01..100, got {width!r}")
    c_in = _multiple_of_8(_STEM * width)
    self.stem = conv(channels, c_in, 3, 2, dtype=dtype, rngs=rngs)
    self.stem_norm = norm(c_in, dtype=dtype, rngs=rngs)
    self.depth = 0
    for expansion, features, count, first in _STAGES:
      c_out = _multiple_of_8(features * width)
      for number in range(count):
        block = InvertedResidual(
          c_in,
          c_out,
          1 if number else first,
          expansion=expansion,
          dtype=dtype,
          rngs=rngs,
        )
        setattr(self, f"block{self.depth}", block)
        self.depth += 1
        c_in = c_out
    c_last = _multiple_of_8(_LAST * max(width, 1.0))
    self.last = conv(c_in, c_last, 1, dtype=dtype, rngs=rngs)
    self.last_norm = norm(c_last, dtype=dtype, rngs=rngs)
    self.head = nnx.Linear(
      c_last,
      num_classes,
      kernel_init=nnx.initializers.normal(0.01),
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nnx.relu6(self.stem_norm(self.stem(x)))
    for number in range(self.depth):
      x = getattr(self, f"block{number}")(x)
    x = nnx.relu6(self.last_norm(self.last(x)))
    return self.head(x.mean((1, 2))).astype(jnp.float32)


class InvertedResidual(nnx.Module):
  """Inverted residual: [n, h, w, c_in] -> [n, h/s, w/s, c_out].

  Attributes:
    expand: 1x1 convolution, None where the expansion is 1.
    depthwise: 3x3 convolution of every channel alone, with the stride.
    project: 1x1 convolution.
  """

  def __init__(
    self,
    c_in: int,
    c_out: int,
    stride: int,
    *,
    expansion: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    hidden = c_in * expansion
    plain = expansion == 1
    self.expand = (
      None if plain else conv(c_in, hidden, 1, dtype=dtype, rngs=rngs)
    )
    self.expand_norm = None if plain else norm(hidden, dtype=dtype, rngs=rngs)
    self.depthwise = conv(
      hidden, hidden, 3, stride, groups=hidden, dtype=dtype, rngs=rngs
    )
    self.depthwise_norm = norm(hidden, dtype=dtype, rngs=rngs)
    self.project = conv(hidden, c_out, 1, dtype=dtype, rngs=rngs)
    self.project_norm = norm(c_out, dtype=dtype, rngs=rngs)
    self.residual = c_in == c_out and stride == 1

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    if self.expand is not None and self.expand_norm is not None:
      y = nnx.relu6(self.expand_norm(self.expand(y)))
    y = nnx.relu6(self.depthwise_norm(self.depthwise(y)))
    y = self.project_norm(self.project(y))
    return x + y if self.residual else y


def _multiple_of_8(channels):
  """The nearest multiple of 8, never more than a tenth below."""
  rounded = max(8, int(channels + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * channels else rounded
