"""Annotations of tensor parallelism, on simulated devices."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dr_jax import deploy, nn, quant

BITS = (8, 4, 2)


def split_over(*names, init=nnx.initializers.lecun_normal()):  # noqa: B008
  return nnx.with_partitioning(init, names)


class Block(nnx.Module):
  """Attention and two layers, in parallel over heads and features."""

  def __init__(self, seed=0):
    rngs = nnx.Rngs(seed)
    ones = nnx.initializers.ones_init()
    self.heads = nnx.LinearGeneral(
      8, (4, 3), kernel_init=split_over(None, "model", None), rngs=rngs
    )
    self.out = nnx.LinearGeneral(
      (4, 3),
      8,
      axis=(-2, -1),
      kernel_init=split_over("model", None, None),
      rngs=rngs,
    )
    self.up = nnx.Linear(
      8, 16, kernel_init=split_over(None, "model"), rngs=rngs
    )
    self.norm = nnx.BatchNorm(
      16, scale_init=split_over("model", init=ones), rngs=rngs
    )
    self.down = nnx.Linear(
      16, 8, kernel_init=split_over("model", None), rngs=rngs
    )

  def __call__(self, x):
    x = x + self.out(nnx.relu(self.heads(x)))
    return x + self.down(nnx.relu(self.norm(self.up(x))))


SPECS = {
  "heads/kernel": (None, "model", None),
  "heads/weight_params/scale": (None, "model"),
  "out/kernel": ("model", None, None),
  "out/weight_params/scale": (None, None),
  "up/kernel": (None, "model"),
  "up/weight_params/scale": (None, "model"),
  "norm/scale": (None, "model"),
  "norm/bias": (None, "model"),
  "norm/mean": (None, "model"),
  "norm/var": (None, "model"),
  "down/kernel": ("model", None),
  "down/weight_params/scale": (None, None),
}
STORED = {
  "heads/encoded/codes": (None, "model"),
  "heads/encoded/scale": (None, "model"),
  "out/encoded/codes": ("model", None),
  "up/encoded/codes": (None, "model"),
  "norm/gain": (None, "model"),
  "norm/offset": (None, "model"),
  "down/encoded/codes": ("model", None),
}


@pytest.fixture(scope="module")
def mesh():
  kinds = (AxisType.Auto, AxisType.Auto)
  return jax.make_mesh(
    (2, 2), ("data", "model"), axis_types=kinds, devices=jax.devices()[:4]
  )


def images(seed=0):
  return jax.random.normal(jax.random.key(seed), (6, 8))


def quantized(model):
  return nn.quantize(
    model,
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=images(),
    skip=(),
  )


@pytest.fixture(scope="module")
def network(mesh):
  with jax.set_mesh(mesh):
    return quantized(Block())


def specs_of(network):
  specs = nnx.get_partition_spec(nnx.state(network))
  return {
    "/".join(map(str, path)): tuple(leaf.get_value())
    for path, leaf in nnx.to_flat_state(specs)
  }


def test_scales_and_rows_are_spread_as_their_channels(network):
  found = specs_of(network)
  assert {name: found[name] for name in SPECS} == SPECS
  assert not any(map(any, (found[n] for n in found if n not in SPECS)))


def outputs(network, placement, x):
  graph, state = nnx.split(network)
  state = jax.device_put(state, placement(state))
  return state, jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, x)


@pytest.mark.parametrize("bits", BITS)
def test_spread_over_devices_it_computes_as_on_one(bits, mesh, network):
  nn.set_bits(network, bits)
  network.eval()
  x = jax.random.normal(jax.random.key(1), (6, 8))
  _, expected = outputs(network, lambda _: jax.devices()[0], x)
  x = jax.device_put(x, NamedSharding(mesh, P("data")))
  state, y = outputs(network, lambda s: nnx.get_named_sharding(s, mesh), x)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  scale = state["up"]["weight_params"]["scale"].get_value()
  assert {s.data.shape for s in scale.addressable_shards} == {(1, 8)}


def test_stored_codes_are_spread_as_their_weights(mesh, network, tmp_path):
  deploy.save(tmp_path / "model", network)
  with jax.set_mesh(mesh):
    stored = deploy.load(tmp_path / "model", model=Block(seed=1))
  found = specs_of(stored)
  assert {name: found[name] for name in STORED} == STORED
  nn.set_bits(stored, 4)
  nn.set_bits(network, 4)
  network.eval()
  placement = lambda s: nnx.get_named_sharding(s, mesh)  # noqa: E731
  np.testing.assert_array_equal(
    *(outputs(m, placement, images())[1] for m in (stored, network))
  )
