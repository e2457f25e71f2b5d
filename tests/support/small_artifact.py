"""The artifact of a small network, other norms at every bit-width."""

import jax
import numpy as np
from flax import nnx

from dr_jax import deploy, models, nn, quant

OPTIONS = {"depth": 8, "num_classes": 5, "channels": 1, "widths": (4, 6, 8)}
BITS = (8, 6, 4, 2)
SERVED = (8, 4, 2)  # of tests of serving


def images(size=3, seed=1):
  return np.asarray(jax.random.normal(jax.random.key(seed), (size, 8, 8, 1)))


def save(path, weight=None, norm="transitional"):
  """Saves a network of images 8x8; the arguments are those of `nn.quantize`."""
  weight = weight or quant.double_rounding(BITS)
  network = nn.quantize(
    models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS),
    weight=weight,
    activation=quant.lsq_activation(weight.bits),
    sample=images(6, 0),
    norm=norm,
  )
  for bits in nn.candidates(network):
    nn.set_bits(network, bits)
    nn.recalibrate(network, [images(6, bits)])
  deploy.save(path, network, architecture=("resnet", OPTIONS))


def mixed(artifact):
  """Bits that differ from layer to layer."""
  return {
    name: artifact.bits[i % len(artifact.bits)]
    for i, name in enumerate(artifact.layer_bytes)
  }
