"""Vision transformers (arXiv 2010.11929), in DeiT's sizes (arXiv 2012.12877).

An image is cut into patches; each becomes a token by one linear map (a
convolution of the patch's size and stride). A class token goes in front,
learned position embeddings are added, and blocks follow,

  x + attention(norm(x)),  x + down(gelu(up(norm(x)))).

The head reads the class token behind a last norm. Layers and initial weights as
timm's, without DeiT's stochastic depth. Sizes: table 1 of arXiv 2012.12877.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dr_jax.models.blocks import check_integer

_NORMAL = nnx.initializers.truncated_normal(0.02)
_EPSILON = 1e-6


class ViT(nnx.Module):
  """Vision transformer: images [n, h, w, channels] -> float32 logits.

  Args:
    depth: number of blocks.
    num_classes: size of the logits.
    image_size: height and width of the images.
    patch_size: height and width of a patch; divides the image's.
    width: features of a token.
    heads: of attention; they divide the width.
    channels: channels of the images.
    dtype: of the computation; parameters are float32.
    rngs: source of initial weights.

  Raises:
    ValueError: for a size that is not allowed, or, when called, images of
      another size.
  """

  def __init__(
    self,
    depth: int,
    *,
    num_classes: int = 1000,
    image_size: int = 224,
    patch_size: int = 16,
    width: int = 192,
    heads: int = 3,
    channels: int = 3,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    _check_sizes(depth, image_size, patch_size, width, heads)
    self.image_size = image_size
    tokens = (image_size // patch_size) ** 2 + 1
    self.patches = nnx.Conv(
      channels,
      width,
      (patch_size, patch_size),
      strides=patch_size,
      padding="VALID",
      dtype=dtype,
      rngs=rngs,
    )
    self.class_token = nnx.Param(_NORMAL(rngs.params(), (1, 1, width)))
    self.positions = nnx.Param(_NORMAL(rngs.params(), (1, tokens, width)))
    self.blocks = nnx.List(
      Block(width, heads, dtype=dtype, rngs=rngs) for _ in range(depth)
    )
    self.norm = _norm(width, dtype, rngs)
    self.head = nnx.Linear(
      width, num_classes, kernel_init=_NORMAL, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    if x.shape[1:3] != (self.image_size,) * 2:
      raise ValueError(
        f"images must be {self.image_size} x {self.image_size} pixels "
        f"(image_size), got {x.shape[1]} x {x.shape[2]}"
      )
    x = self.patches(x)
    x = x.reshape(len(x), -1, x.shape[-1])
    first = jnp.broadcast_to(self.class_token[...], (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
    x += self.positions[...].astype(x.dtype)
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x)[:, 0]).astype(jnp.float32)


class Block(nnx.Module):
  """Attention and a two-layer network, each added to its input."""

  def __init__(
    self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    self.attention_norm = _norm(width, dtype, rngs)
    self.attention = nnx.MultiHeadAttention(
      heads,
      width,
      decode=False,
      kernel_init=_NORMAL,
      dtype=dtype,
      rngs=rngs,
      keep_rngs=False,
    )
    self.up_norm = _norm(width, dtype, rngs)
    self.up = nnx.Linear(
      width, 4 * width, kernel_init=_NORMAL, dtype=dtype, rngs=rngs
    )
    self.down = nnx.Linear(
      4 * width, width, kernel_init=_NORMAL, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    x += self.attention(self.attention_norm(x))
    y = nnx.gelu(self.up(self.up_norm(x)), approximate=False)
    return x + self.down(y)


def vit_tiny(*, width: int = 192, heads: int = 3, **kwargs) -> ViT:
  """ViT-Ti: width 192, 12 blocks, 3 heads; see `ViT` for arguments."""
  return ViT(12, width=width, heads=heads, **kwargs)


def vit_small(*, width: int = 384, heads: int = 6, **kwargs) -> ViT:
  """ViT-S: width 384, 12 blocks, 6 heads."""
  return ViT(12, width=width, heads=heads, **kwargs)


def _norm(width, dtype, rngs):
  return nnx.LayerNorm(width, epsilon=_EPSILON, dtype=dtype, rngs=rngs)


def _check_sizes(depth, image_size, patch_size, width, heads):
  for name, value in (
    ("depth", depth),
    ("image_size", image_size),
    ("patch_size", patch_size),
    ("width", width),
    ("heads", heads),
  ):
    check_integer(name, value, 1, 2**14)
  if image_size % patch_size:
    raise ValueError(
      f"patch_size must divide image_size={image_size}, got {patch_size}"
    )
  if width % heads:
    raise ValueError(f"heads must divide width={width}, got {heads}")
