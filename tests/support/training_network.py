"""A small quantized network and data for the tests of training."""

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax import nn, quant

BITS = (8, 4)


class Net(nnx.Module):
  """Stem, two quantized convolutions with norms, head."""

  def __init__(self, rngs):
    self.stem = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
    self.norm1 = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.conv1 = nnx.Conv(4, 6, (3, 3), strides=2, use_bias=False, rngs=rngs)
    self.norm2 = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
    self.conv2 = nnx.Conv(6, 6, (3, 3), rngs=rngs)
    self.head = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm1(self.stem(x)))
    x = nnx.relu(self.norm2(self.conv1(x)))
    return self.head(self.conv2(x).mean((1, 2)))


def batch(seed=0, size=8):
  key = jax.random.key(seed)
  label = jax.random.randint(key, (size,), 0, 3)
  image = jax.random.normal(key, (size, 6, 6, 1)) + label[
    :, None, None, None
  ].astype(jnp.float32)
  return {"image": image, "label": label}


def quantized(bits=BITS, norm="switchable"):
  return nn.quantize(
    Net(nnx.Rngs(0)),
    weight=quant.double_rounding(bits),
    activation=quant.lsq_activation(bits),
    sample=batch()["image"],
    norm=norm,
  )
