"""Tests of layers that quantize their input again for a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, quant

BITS = (8, 2)
X = jax.random.normal(jax.random.key(1), (4, 5, 6))


def quantized(layer):
  return nn.quantize(
    nnx.Sequential(layer),
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=X,
    skip=(),
  )


def gradients(network, kind):
  """Of all float variables and of the input, by one class's call."""

  def is_float(path, variable):
    return jnp.issubdtype(variable.dtype, jnp.floating)

  graph, floats, rest = nnx.split(network, is_float, ...)

  def loss(floats, x):
    layer = nnx.merge(graph, floats, rest).layers[0]
    return jnp.sin(kind.__call__(layer, x)).sum()

  return jax.jit(jax.grad(loss, argnums=(0, 1)))(floats, X)


@pytest.mark.parametrize(
  "layer",
  [
    nnx.Linear(6, 3, rngs=nnx.Rngs(0)),
    nnx.Conv(6, 3, (3,), padding="CIRCULAR", rngs=nnx.Rngs(0)),
    # Its adapters are no nnx.Param.
    nnx.LoRALinear(6, 3, lora_rank=2, rngs=nnx.Rngs(0)),
  ],
  ids=lambda layer: type(layer).__name__,
)
def test_gradients_are_those_of_what_autodiff_keeps(layer):
  network = quantized(layer)
  nn.set_bits(network, BITS[1])
  ours = gradients(network, type(network.layers[0]))
  theirs = gradients(network, type(layer))
  assert jax.tree.leaves(ours)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
