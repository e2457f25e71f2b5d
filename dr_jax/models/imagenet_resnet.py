"""Residual networks for ImageNet, post-activation and pre-activation.

Stem 7x7 convolution of stride 2, 3x3 max pooling of stride 2, four stages of
basic or bottleneck blocks, the last three starting with stride 2, then global
average and a linear head. arXiv 1512.03385, table 1. In a bottleneck the
stride is on the 3x3 convolution, as torchvision has it ("v1.5").

  post-activation  conv, norm, ReLU, ..., conv, norm; added to the shortcut;
                   ReLU. Its layers are torchvision's.
  pre-activation   norm, ReLU, conv, ..., norm, ReLU, conv; added to the
                   shortcut; norm and ReLU once more before the average
                   (arXiv 1603.05027). A shortcut convolution sees the
                   activated input, and no norm follows it.

The pre-activation stem has no norm: the first block begins with one, and after
max pooling it computes what a norm before the pooling would (norm and ReLU
are increasing wherever the norm's scale is positive).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dr_jax.models.blocks import Stage, check_integer, conv, norm

# Blocks of each stage, and whether they are bottlenecks.
_DEPTHS = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
}


class ImageNetResNet(nnx.Module):
  """ResNet: images [n, h, w, channels] -> float32 logits [n, num_classes].

  Args:
    depth: 18, 34, 50, 101 or 152.
    num_classes: size of the logits.
    preactivation: which of the two kinds.
    width: channels of the first stage's 3x3 convolutions; they double from
      stage to stage, and a bottleneck's output has four times as many.
    channels: channels of the images.
    dtype: of the computation; parameters and statistics are float32.
    rngs: source of initial weights.

  Raises:
    ValueError: for another depth, or a width outside of 1..16384.
  """

  def __init__(
    self,
    depth: int,
    *,
    num_classes: int = 1000,
    preactivation: bool = False,
    width: int = 64,
    channels: int = 3,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if not isinstance(depth, int) or depth not in _DEPTHS:
      raise ValueError(
        f"depth must be one of {', '.join(map(str, _DEPTHS))}, got {depth!r}"
      )
    check_integer("width", width, 1, 2**14)
    if not isinstance(preactivation, bool):
      raise ValueError(
        f"preactivation must be True or False, got {preactivation!r}"
      )
    blocks, bottleneck = _DEPTHS[depth]
    self.preactivation = preactivation
    self.stem = conv(channels, width, 7, 2, dtype=dtype, rngs=rngs)
    self.stem_norm = (
      None if preactivation else norm(width, dtype=dtype, rngs=rngs)
    )
    c_in = width
    stages = []
    for number, count in enumerate(blocks):
      stage = []
      for block in range(count):
        stage.append(
          Block(
            c_in,
            width * 2**number,
            2 if number and not block else 1,
            bottleneck=bottleneck,
            preactivation=preactivation,
            dtype=dtype,
            rngs=rngs,
          )
        )
        c_in = stage[-1].c_out
      stages.append(Stage(stage))
    self.stage1, self.stage2, self.stage3, self.stage4 = stages
    self.norm = norm(c_in, dtype=dtype, rngs=rngs) if preactivation else None
    self.head = nnx.Linear(
      c_in,
      num_classes,
      kernel_init=_uniform_by_fan_in,
      bias_init=_uniform(c_in**-0.5),
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.stem(x)
    if self.stem_norm is not None:
      x = nnx.relu(self.stem_norm(x))
    x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
      x = stage(x)
    if self.norm is not None:
      x = nnx.relu(self.norm(x))
    return self.head(x.mean((1, 2))).astype(jnp.float32)


class Block(nnx.Module):
  """Basic or bottleneck block: [n, h, w, c_in] -> [n, h/s, w/s, c_out].

  Attributes:
    c_out: `width`, or four times that of a bottleneck.
    conv1, norm1, conv2, ...: in the order of calls, without pre-activation.
  """

  conv1: nnx.Conv
  norm1: nnx.BatchNorm

  def __init__(
    self,
    c_in: int,
    width: int,
    stride: int,
    *,
    bottleneck: bool,
    preactivation: bool,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.c_out = 4 * width if bottleneck else width
    self.preactivation = preactivation
    # Kernel size, channels and stride of each convolution.
    layers = [(3, width, stride), (3, width, 1)]
    if bottleneck:
      layers = [(1, width, 1), (3, width, stride), (1, self.c_out, 1)]
    self.depth = len(layers)
    before = c_in
    for number, (size, after, step) in enumerate(layers, start=1):
      layer = conv(before, after, size, step, dtype=dtype, rngs=rngs)
      setattr(self, f"conv{number}", layer)
      features = before if preactivation else after
      setattr(self, f"norm{number}", norm(features, dtype=dtype, rngs=rngs))
      before = after
    same = c_in == self.c_out and stride == 1
    self.shortcut = (
      None
      if same
      else conv(c_in, self.c_out, 1, stride, dtype=dtype, rngs=rngs)
    )
    self.shortcut_norm = (
      None
      if same or preactivation
      else norm(self.c_out, dtype=dtype, rngs=rngs)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    return self._pre(x) if self.preactivation else self._post(x)

  def _post(self, x):
    y = x
    for layer, after in self._layers():
      y = after(layer(y if layer is self.conv1 else nnx.relu(y)))
    if self.shortcut is not None and self.shortcut_norm is not None:
      x = self.shortcut_norm(self.shortcut(x))
    return nnx.relu(x + y)

  def _pre(self, x):
    y = nnx.relu(self.norm1(x))
    if self.shortcut is not None:
      x = self.shortcut(y)
    for layer, before in self._layers():
      y = layer(y if layer is self.conv1 else nnx.relu(before(y)))
    return x + y

  def _layers(self):
    return [
      (getattr(self, f"conv{number}"), getattr(self, f"norm{number}"))
      for number in range(1, self.depth + 1)
    ]


def resnet18(**kwargs) -> ImageNetResNet:
  """ResNet18 (11.7 M parameters); see `ImageNetResNet` for arguments."""
  return ImageNetResNet(18, **kwargs)


def resnet34(**kwargs) -> ImageNetResNet:
  """ResNet34 (21.8 M parameters)."""
  return ImageNetResNet(34, **kwargs)


def resnet50(**kwargs) -> ImageNetResNet:
  """ResNet50 (25.6 M parameters)."""
  return ImageNetResNet(50, **kwargs)


def _uniform(bound):
  """Uniform in [-bound, bound): how torch starts a linear layer."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def _uniform_by_fan_in(key, shape, dtype=jnp.float32):
  return _uniform(shape[0] ** -0.5)(key, shape, dtype)
