"""Exported files, run by ONNX Runtime, and the networks that they are of."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from flax import nnx

from dr_jax import nn


def run(path, x, output=None):
  """An output of a file, its first by default."""
  session = onnxruntime.InferenceSession(
    path, providers=["CPUExecutionProvider"]
  )
  (y,) = session.run(output and [output], {"input": x})
  return y


def expected(network, x, bits=None):
  """What the network gives, at bits if these are given."""
  network = nnx.clone(network)
  if bits is not None:
    nn.set_bits(network, bits)
  return np.asarray(jax.jit(lambda x: network(x))(jnp.asarray(x)))
