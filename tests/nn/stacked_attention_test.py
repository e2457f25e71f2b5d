"""Products of attention in stacks of blocks, as `nnx.scan` takes them."""

import jax
import numpy as np
import pytest
from flax import nnx

from dr_jax import deploy, nn, quant
from dr_jax.nn.products import operands_of
from tests.support.stacked_network import (
  AXES,
  LAYERS,
  Listed,
  Scanned,
  listed,
)

BITS = (8, 4)
X = jax.random.normal(jax.random.key(1), (2, 4, 5))


class Block(nnx.Module):
  def __init__(self, rngs):
    self.attend = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)

  def __call__(self, x):
    return x + self.attend(x)


def quantize(model, **options):
  options = {"skip": (), "init": "max"} | options
  return nn.quantize(
    model,
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    products=quant.lsq_activation(BITS),
    sample=X,
    **options,
  )


@pytest.fixture(scope="module", params=AXES)
def networks(request):
  model = Scanned(block=Block, axes=request.param)
  return model, quantize(model), quantize(Listed(model))


def test_operands_of_a_stack_have_scales_each(networks):
  model, network, expected = networks
  found = dict(operands_of(network))
  single = dict(operands_of(expected))
  assert len(found) == 4 and len(single) == 4 * LAYERS
  for name, operand in found.items():
    scale = operand.input_params["scale"][...]
    assert scale.shape == (LAYERS, len(BITS))
    for i in range(LAYERS):
      own = single[listed(f"{name}/{i}")]
      np.testing.assert_allclose(
        scale[i], own.input_params["scale"][...], rtol=1e-5
      )
  split = nn.functional(network)
  shapes = [numbers.shape for numbers in split.scale_layers]
  assert shapes.count((LAYERS,)) == 4 * 3  # 4 operands, and 4 layers' pairs
  tables = (
    nn.coverage(model, network, X),
    nn.coverage(Listed(model), expected, X),
  )
  macs = [sum(r.macs for r in t if r.kind == "product") for t in tables]
  assert macs[0] == macs[1] == LAYERS * 2 * 4 * 4 * 6
  assert tables[0].macs == tables[1].macs == 1


def test_a_stack_computes_as_a_list_and_as_its_artifact(networks, tmp_path):
  model, network, expected = networks
  deploy.save(tmp_path / "model", network)
  stored = deploy.load(tmp_path / "model", model=model)
  for bits in BITS:
    for each in (network, expected, stored):
      nn.set_bits(each, bits)
    y = network(X)
    np.testing.assert_allclose(y, expected(X), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stored(X), y)


def test_operands_follow_the_bits_of_each_layer_of_a_stack():
  model = Scanned(block=Block)
  network = quantize(model)
  names = [row.name for row in nn.layer_table(network)]
  nn.set_bits(
    network,
    {name: 4 if name.endswith("value/1") else 8 for name in names},
  )
  index = {n: o.bits[...].tolist() for n, o in operands_of(network)}
  prefix = "blocks/attend/attention_fn"
  assert index[f"{prefix}/query"] == index[f"{prefix}/key"] == [0, 0, 0]
  assert index[f"{prefix}/weights"] == index[f"{prefix}/value"] == [0, 1, 0]


class Behind(nnx.Module):
  """Attention behind a stack."""

  def __init__(self):
    self.stack = Scanned()
    rngs = nnx.Rngs(2)
    self.attend = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)

  def __call__(self, x):
    return self.attend(self.stack(x))


def test_operands_behind_a_stack_follow_its_last_layer():
  network = quantize(Behind(), skip="attend/[!a]*")
  names = [row.name for row in nn.layer_table(network)]
  nn.set_bits(
    network, {name: 4 if name == "stack/blocks/b/2" else 8 for name in names}
  )
  found = [operand.bits[...].tolist() for _, operand in operands_of(network)]
  assert names[-1] == "stack/blocks/b/2" and found == [1, 1, 1, 1]
  assert network(X).shape == (2, 4, 6)


def test_operands_that_follow_no_layer_of_their_stack_are_an_error():
  layers = [f"blocks/attend/{n}" for n in ("query", "key", "value", "out")]
  with pytest.raises(ValueError, match=r"products: blocks/.* is in a stack"):
    quantize(Scanned(block=Block), skip=layers)
