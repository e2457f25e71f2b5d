"""Bit-widths as state: setting them, and the table of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, quant

BITS = (8, 4, 2)


class Net(nnx.Module):
  """conv, norm, relu, depthwise conv, norm, mean, linear."""

  def __init__(self, rngs):
    self.head = nnx.Linear(4, 3, rngs=rngs)
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(4, rngs=rngs)
    self.depthwise = nnx.Conv(
      4, 4, (3, 3), strides=2, feature_group_count=4, rngs=rngs
    )
    self.norm2 = nnx.BatchNorm(4, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm1(self.conv(x)))
    x = self.norm2(self.depthwise(x))
    return self.head(x.mean((1, 2)))


LAYERS = ["conv", "depthwise", "head"]
FOLLOWS = {"norm1": "conv", "norm2": "depthwise"}


@pytest.fixture(scope="module")
def built():
  x = np.random.default_rng(0).normal(size=(2, 4, 4, 2))
  return nn.quantize(
    Net(nnx.Rngs(0)),
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=jnp.asarray(x, jnp.float32),
    skip=(),
  )


@pytest.fixture
def model(built):
  return nnx.clone(built)


def positions(model):
  """Every module that holds bits, and its position."""
  return {
    "/".join(map(str, path[:-1])): int(v[...])
    for path, v in nnx.to_flat_state(nnx.state(model, nn.Bits))
  }


def test_a_new_model_is_at_the_highest_bit_width(model):
  assert positions(model) == dict.fromkeys([*LAYERS, *FOLLOWS], 0)
  assert [row.bits for row in nn.layer_table(model)] == [8, 8, 8]


@pytest.mark.parametrize("bits", BITS)
def test_one_number_sets_all_layers_and_norms(model, bits):
  nn.set_bits(model, bits)
  expected = dict.fromkeys([*LAYERS, *FOLLOWS], BITS.index(bits))
  assert positions(model) == expected
  assert [row.bits for row in nn.layer_table(model)] == [bits] * 3


def test_a_mapping_sets_each_layer_and_the_norms_that_follow(model):
  nn.set_bits(model, {"head": 8, "conv": 2, "depthwise": 4})
  assert positions(model) == {
    **{"conv": 2, "norm1": 2},
    **{"depthwise": 1, "norm2": 1},
    "head": 0,
  }
  table = nn.layer_table(model)
  assert {row.name: row.bits for row in table} == {
    **{"conv": 2, "depthwise": 4, "head": 8}
  }


def test_numbers_from_numpy_are_bit_widths_too(model):
  nn.set_bits(model, np.int64(4))
  assert set(positions(model).values()) == {1}
  nn.set_bits(model, dict.fromkeys(LAYERS, np.int32(2)))
  assert set(positions(model).values()) == {2}


@pytest.mark.parametrize(
  ("bits", "named"),
  [
    (3, r"bits of conv must be one of \(8, 4, 2\), got 3"),
    (16, r"bits of conv must be one of \(8, 4, 2\), got 16"),
    (-1, r"bits of conv must be one of \(8, 4, 2\), got -1"),
    (None, r"bits of conv must be one of \(8, 4, 2\), got None"),
    ("4", r"bits of conv must be one of \(8, 4, 2\), got '4'"),
    (4.0, r"bits of conv must be one of \(8, 4, 2\), got 4.0"),
    (np.array([8, 4]), r"bits of conv must be one of \(8, 4, 2\), got array"),
    (
      {"conv": 8, "depthwise": 5, "head": 2},
      r"bits of depthwise must be one of \(8, 4, 2\), got 5",
    ),
    ({"conv": 8, "head": 2}, "missing layers .*depthwise"),
    ({}, "missing layers .*conv.*depthwise.*head"),
    (
      {"conv": 8, "depthwise": 4, "head": 2, "tail": 2},
      "unknown layers .*tail",
    ),
    (
      {"conv": 8, "depthwise": 4, "head": 2, "norm1": 2},
      "unknown layers .*norm1",
    ),
    ({"CONV": 8, "depthwise": 4, "head": 2}, "unknown .*CONV.*missing .*conv"),
  ],
  ids=str,
)
def test_a_wrong_assignment_is_named_and_changes_nothing(model, bits, named):
  nn.set_bits(model, {"head": 8, "conv": 2, "depthwise": 4})
  before = positions(model)
  with pytest.raises(ValueError, match=named):
    nn.set_bits(model, bits)
  assert positions(model) == before


def test_setting_bits_keeps_their_shape_and_dtype(model):
  nn.set_bits(model, {"head": 8, "conv": 2, "depthwise": 4})
  for _, variable in nnx.to_flat_state(nnx.state(model, nn.Bits)):
    assert variable.shape == () and variable.dtype == jnp.int32


def test_a_float_network_has_no_bits_to_set():
  with pytest.raises(ValueError, match=r"call nn\.quantize first"):
    nn.set_bits(Net(nnx.Rngs(0)), 8)
  with pytest.raises(ValueError, match=r"call nn\.quantize first"):
    nn.candidates(Net(nnx.Rngs(0)))
  assert nn.layer_table(Net(nnx.Rngs(0))) == ()


def test_candidates_are_those_of_the_quantizers(model):
  assert nn.candidates(model) == BITS


def test_the_table_holds_what_is_known_of_each_layer(model):
  nn.set_bits(model, {"head": 8, "conv": 2, "depthwise": 4})
  assert nn.layer_table(model) == (
    # 4x4 positions, then 2x2 after the stride.
    nn.LayerRow("conv", "conv", (3, 3, 2, 4), 1, 72, 16 * 72, True, 2),
    nn.LayerRow("depthwise", "conv", (3, 3, 1, 4), 2, 36, 4 * 36, False, 4),
    nn.LayerRow("head", "linear", (4, 3), 1, 12, 12, True, 8),
  )


def test_the_table_prints_in_columns(model):
  nn.set_bits(model, {"head": 8, "conv": 2, "depthwise": 4})
  assert str(nn.layer_table(model)).splitlines() == [
    "name       kind    shape         stride  parameters  macs  signed  bits",
    "conv       conv    (3, 3, 2, 4)  1       72          1152  True    2",
    "depthwise  conv    (3, 3, 1, 4)  2       36          144   False   4",
    "head       linear  (4, 3)        1       12          12    True    8",
  ]


@pytest.mark.parametrize(
  ("strides", "stride"), [(None, 1), (1, 1), (2, 2), ((2, 2), 2), ((1, 3), 3)]
)
def test_the_table_holds_one_stride_however_it_was_given(strides, stride):
  model = nn.quantize(
    nnx.Conv(1, 1, (3, 3), strides=strides, rngs=nnx.Rngs(0)),
    weight=quant.lsq(BITS),
    sample=jnp.ones((1, 6, 6, 1)),
    skip=(),
  )
  assert nn.layer_table(model)[0].stride == stride


def test_the_table_says_which_inputs_stay_float():
  model = nn.quantize(
    nnx.Linear(3, 2, rngs=nnx.Rngs(0)),
    weight=quant.lsq(BITS),
    sample=jnp.ones((2, 3)),
    skip=(),
  )
  assert nn.layer_table(model)[0].signed is None


def test_bits_survive_a_clone_and_a_split(model):
  nn.set_bits(model, {"head": 8, "conv": 2, "depthwise": 4})
  graph, state = nnx.split(nnx.clone(model))
  again = nnx.merge(graph, state)
  assert nn.layer_table(again) == nn.layer_table(model)


def test_a_module_may_follow_several_layers():
  """What a norm for pairs of neighboring bit-widths needs."""

  class Pairs(nnx.Module):
    def __init__(self):
      self.bits = nn.Bits.following(1)
      self.previous = nn.Bits.following(0)

    def __call__(self, x):
      row = self.previous.get_value() * 3 + self.bits.get_value()
      return x, row

  class Net(nnx.Module):
    def __init__(self):
      self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
      self.second = nnx.Linear(4, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
      x = self.second(self.first(x))
      return self.pairs(x) if hasattr(self, "pairs") else x

  x = jnp.ones((2, 4))
  model = nn.quantize(
    Net(), weight=quant.double_rounding((8, 4, 2)), sample=x, skip=()
  )
  model.pairs = Pairs()
  nn.set_bits(model, {"first": 4, "second": 2})
  assert int(model(x)[1]) == 1 * 3 + 2
  split = nn.functional(model)
  (_, row), _ = jax.jit(split.apply)(
    split.params, split.batch_stats, jnp.array([2, 1]), x
  )
  assert int(row) == 2 * 3 + 1
