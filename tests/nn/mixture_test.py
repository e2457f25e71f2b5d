"""Bits as weights over the candidates: what a differentiable search needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, quant

BITS = (8, 4, 2)


class Net(nnx.Module):
  """Two convolutions with norms, and a linear layer."""

  def __init__(self, rngs):
    self.conv1 = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.conv2 = nnx.Conv(4, 4, (3, 3), rngs=rngs)
    self.norm2 = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm1(self.conv1(x)))
    x = nnx.relu(self.norm2(self.conv2(x)))
    return self.head(x.mean((1, 2)))


def images(seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(8, 6, 6, 2)), jnp.float32)


@functools.cache
def network(norm):
  """A network whose norm rows all differ."""
  model = nn.quantize(
    Net(nnx.Rngs(0)),
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=images(),
    norm=norm,
    skip=(),
  )
  split = nn.functional(model)
  rng = np.random.default_rng(1)

  def scattered(tree, kinds):
    return jax.tree.map(
      lambda a, kind: (
        jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)
        if kind == "norm"
        else a
      ),
      tree,
      kinds,
    )

  stats = jax.tree.map(
    lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype),
    split.batch_stats,
  )
  return split._replace(
    params=scattered(split.params, split.param_labels), batch_stats=stats
  )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", nn.NORMS)
@pytest.mark.parametrize("index", [(0, 1, 2), (2, 2, 0), (1, 0, 1)])
def test_all_weight_on_one_candidate_is_that_candidate(norm, index, train):
  net = network(norm)
  hard, hard_stats = net.apply(
    net.params, net.batch_stats, jnp.array(index), images(), train=train
  )
  soft, soft_stats = net.apply(
    net.params,
    net.batch_stats,
    jax.nn.one_hot(jnp.array(index), 3),
    images(),
    train=train,
  )
  # Sums with zeros are exact; the products around them may be fused.
  np.testing.assert_allclose(soft, hard, rtol=1e-5, atol=1e-6)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
    soft_stats,
    hard_stats,
  )


def linear():
  """One linear layer, and what it quantizes to at each bit-width."""
  x = images()[:, 0, 0, :]
  layer = nn.quantize(
    nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=x,
    skip=(),
  ).layers[0]
  kernels = [
    layer.weight_quantizer.fake_quantize(
      {"scale": layer.weight_params["scale"][...]}, layer.kernel[...], i
    )
    for i in range(3)
  ]
  inputs = [
    layer.input_quantizer.fake_quantize(
      {"scale": layer.input_params["scale"][...]}, x, i
    )
    for i in range(3)
  ]
  return layer, x, jnp.stack(kernels), jnp.stack(inputs)


def test_a_mixture_averages_quantized_kernels_and_inputs():
  layer, x, kernels, inputs = linear()
  net = nn.functional(layer)
  weights = jnp.array([0.5, 0.3, 0.2])
  y, _ = net.apply(net.params, net.batch_stats, weights[None], x)
  expected = np.tensordot(weights, inputs, 1) @ np.tensordot(
    weights, kernels, 1
  )
  # Three float32 terms in another order.
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_weight_is_what_its_candidate_contributes():
  layer, x, kernels, inputs = linear()
  net = nn.functional(layer)
  weights = jnp.array([0.5, 0.3, 0.2])
  gradient = jax.grad(
    lambda w: net.apply(net.params, net.batch_stats, w[None], x)[0].sum()
  )(weights)
  kernel = np.tensordot(weights, kernels, 1)
  mixed = np.tensordot(weights, inputs, 1)
  expected = [
    (np.asarray(q) @ kernel + mixed @ np.asarray(k)).sum()
    for q, k in zip(inputs, kernels, strict=True)
  ]
  np.testing.assert_allclose(gradient, expected, rtol=1e-4)


def test_each_norm_row_moves_by_its_weight_in_the_mixture():
  weights = jnp.array([0.5, 0.25, 0.25])
  net = network("transitional")
  mixed = jnp.tile(weights, (3, 1))
  _, stats = net.apply(net.params, net.batch_stats, mixed, images(), train=True)
  old, new = net.batch_stats["norm2"]["mean"], stats["norm2"]["mean"]
  # Row (i, j) moves by w_i w_j of what it would move alone.
  shares = np.outer(weights, weights).ravel()
  value = np.asarray(new - old) / shares[:, None] / (1 - 0.9) + np.asarray(old)
  np.testing.assert_allclose(value, np.tile(value[:1], (9, 1)), rtol=1e-3)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3), (3, 3, 1)])
def test_weights_of_another_shape_are_rejected(shape):
  net = network("switchable")
  with pytest.raises(
    ValueError, match=r"index must have shape \(3, 3\), a weight for each"
  ):
    net.apply(net.params, net.batch_stats, jnp.ones(shape), images())
