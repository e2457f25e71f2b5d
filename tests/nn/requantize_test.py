"""Another weight quantizer, or other norms, for a quantized network."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, quant

BITS = (8, 4, 2)


class Net(nnx.Module):
  """conv, norm, relu, conv, norm, relu, mean, head."""

  def __init__(self, rngs):
    self.conv1 = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(4, rngs=rngs)
    self.conv2 = nnx.Conv(4, 4, (3, 3), rngs=rngs)
    self.norm2 = nnx.BatchNorm(4, momentum=0.5, epsilon=0.1, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm1(self.conv1(x)))
    x = nnx.relu(self.norm2(self.conv2(x)))
    return self.head(x.mean((1, 2)))


def images(seed=0):
  x = np.random.default_rng(seed).normal(size=(4, 4, 4, 2))
  return jnp.asarray(x, jnp.float32)


def quantize(norm="switchable", weight=None):
  model = nn.quantize(
    Net(nnx.Rngs(0)),
    weight=weight or quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=images(),
    norm=norm,
    skip=(),
  )
  # As if trained: nothing is where it started.
  rng = np.random.default_rng(5)
  for _, v in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
    factor = rng.uniform(0.7, 1.3, v.shape)
    v[...] = (v[...] + 0.01) * jnp.asarray(factor, v.dtype)
  return model


def arrays(model):
  return {
    "/".join(map(str, path)): np.asarray(v[...])
    for path, v in nnx.to_flat_state(nnx.state(model))
  }


def assert_same(before, after, *, but=()):
  assert set(before) - set(but) == set(after) - set(but)
  for name in set(before) - set(but):
    np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def run(model):
  model = nnx.clone(model)
  model.eval()
  return nnx.jit(lambda m, x: m(x))(model, images())


MIXED = {"conv1": 4, "conv2": 2, "head": 8}
SCALES = [f"{layer}/weight_params/scale" for layer in MIXED]


def test_another_weight_quantizer_starts_from_the_present_kernels():
  model = quantize()
  nn.set_bits(model, MIXED)
  before = arrays(model)
  weight = quant.lsq(BITS)
  again = nn.requantize(model, weight=weight)
  assert_same(before, arrays(model))
  assert_same(before, arrays(again), but=SCALES)
  assert nn.layer_table(again) == nn.layer_table(model)
  for name in MIXED:
    layer = getattr(again, name)
    assert layer.weight_quantizer is weight
    expected = weight.init(layer.kernel[...])["scale"]
    # Compiled and eager sums differ in the last bits.
    np.testing.assert_allclose(
      layer.weight_params["scale"][...], expected, rtol=1e-6
    )
  assert not np.array_equal(run(again), run(model))


def test_the_new_network_equals_one_quantized_that_way():
  model = quantize()
  again = nn.requantize(model, weight=quant.lsq(BITS))
  fresh = quantize(weight=quant.lsq(BITS))
  trained = nn.functional(again)
  assert set(arrays(fresh)) == set(arrays(again))
  nn.update(fresh, params=trained.params, batch_stats=trained.batch_stats)
  for bits in BITS:
    nn.set_bits(fresh, bits)
    nn.set_bits(again, bits)
    np.testing.assert_array_equal(run(fresh), run(again))
  stored = nn.deployed.assemble(Net(nnx.Rngs(1)), nn.deployed.parts_of(again))
  nn.set_bits(stored, BITS[-1])
  np.testing.assert_allclose(run(stored), run(again), rtol=1e-5, atol=1e-5)


def test_rows_of_pairs_start_as_the_rows_of_the_own_bit_width():
  model = quantize()
  nn.set_bits(model, MIXED)
  before = arrays(model)
  pairs = nn.requantize(model, norm="transitional")
  assert_same(before, arrays(model))
  rows = [f"norm2/{name}" for name in ("scale", "bias", "mean", "var")]
  after = arrays(pairs)
  assert_same(before, after, but=[*rows, "norm2/previous"])
  for name in rows:
    assert after[name].shape == (9, 4)
    for previous in range(3):
      for own in range(3):
        np.testing.assert_array_equal(
          after[name][3 * previous + own], before[name][own]
        )
  assert pairs.norm2.orders == (0, 1)
  for bits in (MIXED, {"conv1": 2, "conv2": 4, "head": 2}, *BITS):
    nn.set_bits(model, bits)
    nn.set_bits(pairs, bits)
    np.testing.assert_array_equal(run(pairs), run(model))


def test_bits_in_use_stay_also_in_pairs():
  model = quantize()
  nn.set_bits(model, MIXED)
  pairs = nn.requantize(model, norm="transitional")
  assert nn.layer_table(pairs) == nn.layer_table(model)
  assert int(pairs.norm2.row) == 3 * BITS.index(4) + BITS.index(2)
  np.testing.assert_array_equal(run(pairs), run(model))


def test_options_and_mode_of_a_norm_stay():
  model = quantize()
  model.eval()
  pairs = nn.requantize(model, norm="transitional")
  assert pairs.norm2.momentum == 0.5 and pairs.norm2.epsilon == 0.1
  assert pairs.norm2.use_running_average is True


def test_weight_and_norm_change_together():
  model = quantize()
  both = nn.requantize(model, weight=quant.lsq(BITS), norm="transitional")
  one = nn.requantize(model, weight=quant.lsq(BITS))
  assert_same(arrays(nn.requantize(one, norm="transitional")), arrays(both))
  assert both.norm2.rows == 9
  assert both.conv1.weight_quantizer.name == "lsq"


@pytest.mark.parametrize("kind", nn.NORMS)
@pytest.mark.parametrize("wanted", ["the same", None])
def test_norms_of_the_same_kind_stay(kind, wanted):
  model = quantize(norm=kind)
  copy = nn.requantize(model, norm=kind if wanted else None)
  assert_same(arrays(model), arrays(copy))
  copy.head.bias[...] = copy.head.bias[...] + 1
  assert not np.array_equal(copy.head.bias[...], model.head.bias[...])


@pytest.mark.parametrize(
  ("kind", "wanted", "message"),
  [
    ("switchable", "shared", "norm must be one of None,.*got 'shared'"),
    (
      "transitional",
      "switchable",
      "norm must be one of None,.*got 'switchable'",
    ),
    ("transitional", "shared", "norm must be one of None,.*got 'shared'"),
    (
      "shared",
      "transitional",
      "norm must be one of None, 'shared' for norms that",
    ),
    (
      "shared",
      "switchable",
      "norm must be one of None, 'shared' for norms that",
    ),
    ("switchable", "layer", "norm must be None or one of.*got 'layer'"),
  ],
)
def test_other_changes_of_norms_are_an_error(kind, wanted, message):
  with pytest.raises(ValueError, match=message):
    nn.requantize(quantize(norm=kind), norm=wanted)


def test_other_bits_are_an_error():
  with pytest.raises(
    ValueError, match=r"weight\.bits must be the bits.*got \(8, 4\)"
  ):
    nn.requantize(quantize(), weight=quant.lsq((8, 4)))


def test_a_weight_that_is_not_finite_is_an_error():
  model = quantize()
  model.conv2.kernel[...] = model.conv2.kernel[...].at[0, 0, 0, 0].set(jnp.nan)
  with pytest.raises(
    ValueError, match="weight of layer 'conv2' must be finite, but 1"
  ):
    nn.requantize(model, weight=quant.lsq(BITS))


@pytest.mark.parametrize(
  "change", [{"norm": "transitional"}, {"weight": quant.lsq(BITS)}]
)
def test_networks_that_are_not_quantized_or_hold_codes_are_an_error(change):
  with pytest.raises(ValueError, match=r"call nn\.quantize first"):
    nn.requantize(Net(nnx.Rngs(0)), **change)
  stored = nn.deployed.assemble(
    Net(nnx.Rngs(0)), nn.deployed.parts_of(quantize())
  )
  with pytest.raises(
    ValueError, match="layer conv1 holds stored codes; pass what"
  ):
    nn.requantize(stored, **change)


def test_tied_kernels_stay_tied():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.one = nnx.Linear(4, 4, rngs=rngs)
      self.two = nnx.Linear(4, 4, rngs=rngs)
      self.two.kernel = self.one.kernel

    def __call__(self, x):
      return self.two(self.one(x))

  model = nn.quantize(
    Tied(nnx.Rngs(0)),
    weight=quant.double_rounding(BITS),
    sample=jnp.ones((2, 4)),
    skip=(),
  )
  again = nn.requantize(model, weight=quant.lsq(BITS))
  assert again.one.kernel is again.two.kernel
