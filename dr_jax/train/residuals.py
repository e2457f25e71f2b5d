"""Bytes that a forward pass keeps for its backward pass, without compiling.

`jax.vjp` returns a function that holds the arrays that the forward pass left
for it: their shapes take a trace. XLA keeps less, since it computes cheap ones
again. All temporary memory of compiled passes, that of gradients included
(`memory_analysis` on a CPU, float32), over these bytes:

  0.36, 0.49    ResNet20 at CIFAR's shape, at {8, 6, 4, 2} bits and float
  0.64, 0.53    ResNet8 there, at {8, 4} bits and float
  0.88, 0.77    a transformer of width 64, at {8, 4} bits and float
  0.95          a vision transformer of width 64, float
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dr_jax.nn import Functional
from dr_jax.runtime.tree import array_bytes
from dr_jax.train.distill import cross_entropy


def residual_bytes(network: Functional, inputs: jax.ShapeDtypeStruct) -> int:
  """Returns the bytes that a pass keeps for its backward pass.

  Parameters, statistics and the inputs themselves are not counted: they are
  there anyway.

  Args:
    network: float, or quantized, then at its highest bit-width; arrays or
      their shapes.
    inputs: shape and dtype of a batch [n, ...].

  >>> from flax import nnx
  >>> from dr_jax import nn
  >>> layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(3)]
  >>> batch = jax.ShapeDtypeStruct((8, 4), jnp.float32)
  >>> small, large = (
  ...   residual_bytes(nn.functional(nnx.Sequential(*layers[:n])), batch)
  ...   for n in (2, 3)
  ... )
  >>> large - small  # what the third layer multiplies: 8 x 4 floats
  128
  """

  def kept(params, batch_stats, inputs):
    def loss(params):
      logits, _ = network.apply(params, batch_stats, 0, inputs, train=True)
      labels = jnp.zeros(logits.shape[:-1], jnp.int32)
      return cross_entropy(logits, labels)

    _, backward = jax.vjp(loss, params)
    given = jax.tree.leaves((params, batch_stats, inputs))
    known = set(map(id, given))
    return [leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in known]

  return array_bytes(
    jax.eval_shape(kept, network.params, network.batch_stats, inputs)
  )
