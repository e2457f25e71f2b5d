"""Networks of public Flax NNX packages, each as its package builds it.

Of `.[test-foreign]`; see dr_jax/benchmarks/foreign_networks.py for the others.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dr_jax import deploy, nn
from dr_jax.benchmarks.foreign_models import BITS, quantized
from dr_jax.benchmarks.foreign_networks import NETWORKS
from dr_jax.benchmarks.products import products

pytestmark = [
  pytest.mark.slow,
  # Of the packages, and of what they import.
  pytest.mark.filterwarnings("ignore"),
]
# Share of the multiply-accumulates with parameters, where it is not all: an
# embedding of its own that also computes the logits.
SHARES = {"Gemma3": 0.9}


@pytest.fixture(autouse=True)
def jax_as_packages_expect_it():
  with (
    jax.numpy_rank_promotion("allow"),
    jax.numpy_dtype_promotion("standard"),
  ):
    yield


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_quantized_trained_and_stored(name, tmp_path):
  network = NETWORKS[name]
  pytest.importorskip(network.module.split(".")[0])
  model = network.model()
  x = network.inputs(jax.random.key(0))
  ours = quantized(network, model)
  rows = nn.coverage(model, ours, x)
  examples = next(each.shape[0] for each in x if jnp.ndim(each))
  macs = examples * sum(row.macs or 0 for row in rows if not row.reason)
  found = products(network.function(model), *x)
  of_layers = sum(p.macs for p in found if p.of_layer)
  np.testing.assert_allclose(macs / of_layers, SHARES.get(name, 1), atol=0.01)

  split = nn.functional(ours)

  @jax.jit
  def loss_and_gradients(index):
    def loss(params):
      y = network.output(split.apply(params, split.batch_stats, index, *x)[0])
      return jnp.square(y).mean(), y

    return jax.value_and_grad(loss, has_aux=True)(split.params)

  expected = jax.jit(network.function(model))(*x)
  deploy.save(tmp_path / name, ours)
  stored = deploy.load(tmp_path / name, model=network.model(seed=1))
  kernels = nn.kernel_paths(ours).values()
  errors = []
  for index, bits in enumerate(BITS):
    (_, y), gradients = loss_and_gradients(jnp.int32(index))
    errors.append(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))
    flat = traverse_util.flatten_dict(gradients, sep="/")
    for path in kernels:
      assert np.isfinite(flat[path]).all() and np.any(flat[path]), path
    for each in (ours, stored):
      nn.set_bits(each, bits)
    by = [jax.jit(network.function(each))(*x) for each in (ours, stored)]
    np.testing.assert_array_equal(*by)
  assert errors[0] < 0.15 and errors[0] < errors[1] < errors[2], errors
