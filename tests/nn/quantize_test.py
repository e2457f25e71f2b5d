"""Networks that were not written for the library, turned multi-precision."""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, quant

BITS = (8, 4, 2)


class Mlp(nnx.Module):
  def __init__(self, rngs):
    # The order of attributes is not that of the calls.
    self.a_last = nnx.Linear(5, 3, rngs=rngs)
    self.first = nnx.Linear(6, 8, rngs=rngs)
    self.middle = nnx.Linear(8, 5, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.first(x))
    x = self.dropout(nnx.relu(self.middle(x)))
    return self.a_last(x)


class Separable(nnx.Module):
  def __init__(self, rngs):
    conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
    self.stem = nnx.Sequential(
      conv(3, 4, (3, 3), strides=2), nnx.BatchNorm(4, rngs=rngs), nnx.relu
    )
    self.blocks = nnx.List(
      nnx.Sequential(
        conv(4, 4, (3, 3), feature_group_count=4),
        nnx.BatchNorm(4, rngs=rngs),
        nnx.relu6,
        conv(4, 4, (1, 1)),
      )
      for _ in range(2)
    )
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x)
    for block in self.blocks:
      x = block(x)
    return self.head(x.mean((1, 2)))


class Residual(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.shortcut = nnx.Conv(4, 4, (1, 1), rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x)
    x = nnx.relu(self.norm(self.conv(x))) + self.shortcut(x)
    return self.head(x.mean((1, 2)))


class Pair(NamedTuple):
  left: nnx.Linear
  right: nnx.Linear


class Holder(nnx.Pytree):
  def __init__(self, rngs):
    self.linear = nnx.Linear(6, 6, rngs=rngs)


class Boxed(nnx.Module):
  """Layers in every kind of container that Flax can look into."""

  def __init__(self, rngs):
    linear = functools.partial(nnx.Linear, 6, 6, rngs=rngs)
    self.plain = nnx.data((linear(), [linear()]))
    self.named = nnx.data({"one": linear(), "deep": {"two": (linear(),)}})
    self.pair = nnx.data(Pair(linear(), linear()))
    self.holder = Holder(rngs)
    self.dict = nnx.Dict(three=linear())
    self.lists = nnx.data((nnx.List([linear()]),))

  def __call__(self, x):
    for layer in (
      self.plain[0],
      self.plain[1][0],
      self.named["one"],
      self.named["deep"]["two"][0],
      self.pair.left,
      self.pair.right,
      self.holder.linear,
      self.dict["three"],
      self.lists[0][0],
    ):
      x = layer(x)
    return x


BOXES = [
  *("plain/0", "plain/1/0", "named/one", "named/deep/two/0"),
  *("pair/left", "pair/right", "holder/linear", "dict/three", "lists/0/0"),
]


class Shared(nnx.Module):
  """One layer under two attributes; its second input alone is negative."""

  def __init__(self, rngs):
    self.one = nnx.Linear(4, 4, rngs=rngs)
    self.two = self.one
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.two(self.one(x) - 1)))


class Twice(nnx.Module):
  """One layer called twice, under one attribute."""

  def __init__(self, rngs):
    self.layer = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, x):
    return self.layer(self.layer(x) - 1)


class Wrapped(nnx.Module):
  """A layer, called the way a test says."""

  def __init__(self, call, layer=None, rngs=None):
    self.layer = layer or nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    self.call = call

  def __call__(self, *args):
    return self.call(self.layer, *args)


def random(*shape, seed=0, positive=False):
  x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return jnp.asarray(np.abs(x) if positive else x)


def quantize(model, sample, **options):
  options = {
    "weight": quant.double_rounding(BITS),
    "activation": quant.lsq_activation(BITS),
    "skip": (),
    **options,
  }
  return nn.quantize(model, sample=sample, **options)


NETWORKS = {
  "mlp": (Mlp, (5, 6)),
  "separable": (Separable, (2, 8, 8, 3)),
  "residual": (Residual, (2, 6, 6, 3)),
  "boxed": (Boxed, (5, 6)),
  "shared": (Shared, (5, 4)),
  "twice": (Twice, (5, 4)),
}


def network(name):
  make, shape = NETWORKS[name]
  return make(nnx.Rngs(0)), random(*shape)


@functools.cache
def converted(name):
  """The float network and what it became; neither is to be changed."""
  model, x = network(name)
  return model, quantize(model, x), x


def arrays(model):
  return {
    "/".join(map(str, path)): np.asarray(
      jax.random.key_data(v[...])
      if jnp.issubdtype(v[...].dtype, jax.dtypes.prng_key)
      else v[...]
    )
    for path, v in nnx.to_flat_state(nnx.state(model))
  }


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_runs_at_every_bit_width_near_its_float_output(name):
  model, quantized, x = converted(name)
  model, quantized = nnx.clone(model), nnx.clone(quantized)
  model.eval()
  quantized.eval()
  run = nnx.jit(lambda m, x: m(x))
  exact = np.asarray(run(model, x))
  errors = []
  for bits in BITS:
    nn.set_bits(quantized, bits)
    y = np.asarray(run(quantized, x))
    assert y.shape == exact.shape and y.dtype == exact.dtype
    errors.append(np.abs(y - exact).mean() / np.abs(exact).mean())
  # Eight bits cost a few percent a layer at initialization, two far more.
  assert 0 < errors[0] < 0.25
  assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_values_of_float_parameters_stay(name):
  model, quantized, _ = converted(name)
  before, after = arrays(model), arrays(quantized)
  added = {"bits", "weight_params", "input_params"}
  kept = {k: v for k, v in after.items() if not added & set(k.split("/"))}
  assert set(kept) == set(before)
  for path, value in before.items():
    same = kept[path]
    # Norms have a row for each bit-width.
    expected = value if same.ndim == value.ndim else np.stack([value] * 3)
    np.testing.assert_array_equal(same, expected)


@pytest.mark.parametrize("name", ["residual", "shared", "mlp"])
def test_the_original_network_is_left_unchanged(name):
  model, x = network(name)
  before = arrays(model)
  graph = nnx.graphdef(model)
  quantized = quantize(model, x)
  quantized.eval()
  nn.set_bits(quantized, 2)
  for _, variable in nnx.to_flat_state(nnx.state(quantized, nnx.Param)):
    variable[...] = variable[...] + 1
  after = arrays(model)
  assert set(after) == set(before)
  for path in before:
    np.testing.assert_array_equal(before[path], after[path])
  assert nnx.graphdef(model) == graph


def test_no_float_layer_is_left_in_any_container():
  quantized = converted("boxed")[1]
  table = nn.layer_table(quantized)
  assert [row.name for row in table] == BOXES
  linear = [
    m for _, m in nnx.iter_modules(quantized) if isinstance(m, nnx.Linear)
  ]
  assert len(linear) == len(BOXES)
  assert all(type(layer) is nn.Linear for layer in linear)
  assert type(quantized.pair) is Pair
  assert type(quantized.plain) is tuple


def test_layers_come_in_call_order():
  quantized = converted("mlp")[1]
  names = [row.name for row in nn.layer_table(quantized)]
  assert names == ["first", "middle", "a_last"]
  quantized = converted("separable")[1]
  names = [row.name for row in nn.layer_table(quantized)]
  assert names == [
    "stem/layers/0",
    *("blocks/0/layers/0", "blocks/0/layers/3"),
    *("blocks/1/layers/0", "blocks/1/layers/3"),
    "head",
  ]


def test_input_signs_are_those_of_the_sample():
  model, quantized, x = converted("mlp")
  signs = [row.signed for row in nn.layer_table(quantized)]
  assert signs == [True, False, False]
  signs = [row.signed for row in nn.layer_table(quantize(model, jnp.abs(x)))]
  assert signs == [False, False, False]


@pytest.mark.parametrize("signed", [True, False])
def test_a_sign_chosen_by_the_user_is_kept(signed):
  activation = quant.lsq_activation(BITS, signed=signed)
  model, x = network("mlp")
  quantized = quantize(model, x, activation=activation)
  assert {row.signed for row in nn.layer_table(quantized)} == {signed}
  top = 127 if signed else 255
  np.testing.assert_allclose(
    quantized.first.input_params["scale"][0],
    2 * np.abs(np.asarray(x)).mean() / np.sqrt(top),
    rtol=1e-5,
  )


def test_costs_are_those_counted_by_hand():
  rows = nn.layer_table(converted("separable")[1])
  # 8x8 images, stride 2: 4x4 positions.
  assert [row.macs for row in rows] == [
    16 * 4 * 9 * 3,
    *(16 * 4 * 9, 16 * 4 * 4),
    *(16 * 4 * 9, 16 * 4 * 4),
    4 * 3,
  ]
  assert [row.parameters for row in rows] == [108, 36, 16, 36, 16, 12]


def test_costs_do_not_depend_on_the_size_of_the_batch():
  model, _ = network("residual")
  tables = [nn.layer_table(quantize(model, random(n, 6, 6, 3))) for n in (1, 3)]
  macs = [[row.macs for row in table] for table in tables]
  assert macs[0] == macs[1]
  assert macs[0][0] == 36 * 27 * 4


@pytest.mark.parametrize("dims", [1, 2])
def test_macs_of_linear_layers_count_every_position(dims):
  x = random(2, *(3,) * dims, 6)
  rows = nn.layer_table(quantize(Wrapped(lambda layer, x: layer(x)), x))
  assert rows[0].macs == 3**dims * 36


def test_activation_scales_follow_the_formula_on_the_real_inputs():
  model, quantized, x = converted("mlp")
  kernels = {
    name: np.asarray(getattr(model, name).kernel[...], np.float64)
    for name in ("first", "middle")
  }
  inputs = {"first": np.asarray(x, np.float64)}
  inputs["middle"] = np.maximum(inputs["first"] @ kernels["first"], 0)
  # Calibration is inference: dropout leaves its input alone.
  inputs["a_last"] = np.maximum(inputs["middle"] @ kernels["middle"], 0)
  tops = {"first": (127, 7, 1), "middle": (255, 15, 3), "a_last": (255, 15, 3)}
  for name, value in inputs.items():
    scale = getattr(quantized, name).input_params["scale"][...]
    expected = 2 * np.abs(value).mean() / np.sqrt(tops[name])
    np.testing.assert_allclose(scale, expected, rtol=1e-5)


def test_weight_scales_cover_three_standard_deviations():
  model, quantized, _ = converted("residual")
  for name in ("conv", "head"):
    w = np.asarray(getattr(model, name).kernel[...], np.float64)
    axes = tuple(range(w.ndim - 1))
    mean, std = w.mean(axes), w.std(axes)
    bound = np.maximum(np.abs(mean - 3 * std), np.abs(mean + 3 * std))
    scale = getattr(quantized, name).weight_params["scale"][...]
    assert scale.shape == (1,) * len(axes) + w.shape[-1:]
    np.testing.assert_allclose(scale.reshape(-1), bound / 128, rtol=1e-5)


@pytest.mark.parametrize("name", ["shared", "twice"])
def test_a_layer_called_twice_sees_both_inputs_at_double_cost(name):
  model, _ = network(name)
  layer = model.one if name == "shared" else model.layer
  layer.kernel[...] = jnp.eye(4) * 0.5
  x = random(5, 4, positive=True)
  quantized = quantize(model, x)
  row = nn.layer_table(quantized)[0]
  assert row.macs == 2 * 16
  # The first input is positive; the second, x / 2 - 1, is not.
  assert row.signed is True
  seen = np.concatenate([np.asarray(x), np.asarray(x) / 2 - 1])
  found = quantized.one if name == "shared" else quantized.layer
  np.testing.assert_allclose(
    found.input_params["scale"][...],
    2 * np.abs(seen).mean() / np.sqrt((127, 7, 1)),
    rtol=1e-5,
  )


def test_a_shared_layer_stays_shared():
  quantized = quantize(*network("shared"))
  assert quantized.one is quantized.two
  assert len(nn.layer_table(quantized)) == 2
  nn.set_bits(quantized, {"one": 2, "head": 8})
  assert int(quantized.two.bits[...]) == 2


def test_tied_kernels_stay_tied():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.one = nnx.Linear(4, 4, rngs=rngs)
      self.two = nnx.Linear(4, 4, rngs=rngs)
      self.two.kernel = self.one.kernel

    def __call__(self, x):
      return self.two(self.one(x))

  quantized = quantize(Tied(nnx.Rngs(0)), random(5, 4))
  assert quantized.one.kernel is quantized.two.kernel
  paths = list(nn.functional(quantized).params["two"])
  assert "kernel" not in paths


def test_dropout_still_drops_in_training_and_not_in_evaluation():
  _, quantized, x = converted("mlp")
  quantized = nnx.clone(quantized)
  quantized.train()
  assert not np.array_equal(quantized(x), quantized(x))
  quantized.eval()
  np.testing.assert_array_equal(quantized(x), quantized(x))


def test_calibration_neither_trains_nor_changes_the_mode():
  model, x = network("residual")
  model.train()
  quantized = quantize(model, x)
  assert quantized.norm.use_running_average is False
  np.testing.assert_array_equal(quantized.norm.mean[...], np.zeros((3, 4)))
  model.eval()
  assert quantize(model, x).norm.use_running_average is True


def test_a_model_can_be_one_layer():
  x = random(5, 6)
  layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
  quantized = quantize(layer, x)
  assert type(quantized) is nn.Linear
  assert [row.name for row in nn.layer_table(quantized)] == ["linear"]
  nn.set_bits(quantized, {"linear": 4})
  assert int(quantized.bits[...]) == 1
  with pytest.raises(
    ValueError, match="skip must leave a layer to quantize; the model's"
  ):
    quantize(layer, x, skip=nn.first_and_last)


def test_a_sample_of_several_arguments_reaches_the_call():
  def call(layer, x, tree, factor, flag):
    assert flag is True
    return layer(x * tree["scale"] * factor)

  x = random(5, 6)
  sample = (x, {"scale": jnp.float32(3.0)}, 2.0, True)
  quantized = quantize(Wrapped(call), sample)
  np.testing.assert_allclose(
    quantized.layer.input_params["scale"][0],
    6 * 2 * np.abs(np.asarray(x)).mean() / np.sqrt(127),
    rtol=1e-5,
  )


def test_a_sample_may_be_a_dictionary():
  model = Wrapped(lambda layer, batch: layer(batch["x"]))
  quantized = quantize(model, {"x": random(5, 6)})
  assert nn.layer_table(quantized)[0].macs == 36


def test_inputs_may_be_given_by_keyword():
  x = random(5, 6)
  model = Wrapped(lambda layer, x: layer(inputs=x))
  quantized = quantize(model, x)
  assert quantized(x).shape == (5, 6)


def test_inputs_of_different_dtypes_share_a_scale():
  def call(layer, x):
    y = layer(x)
    return y + layer(x.astype(jnp.bfloat16)).astype(y.dtype)

  layer = nnx.Linear(6, 6, dtype=jnp.float32, rngs=nnx.Rngs(0))
  quantized = quantize(Wrapped(call, layer), random(5, 6))
  assert nn.layer_table(quantized)[0].macs == 72


@pytest.mark.parametrize(
  ("skip", "left"),
  [
    ((), ["first", "middle", "a_last"]),
    (nn.first_and_last, ["middle"]),
    ("middle", ["first", "a_last"]),
    ("*a*", ["first", "middle"]),
    ("mid*", ["first", "a_last"]),
    (("first", "mid?le"), ["a_last"]),
    (lambda names: names[1:2], ["first", "a_last"]),
    ([nn.first_and_last, "first"], ["middle"]),
    ({"first"}, ["middle", "a_last"]),
  ],
)
def test_skip_rules_leave_layers_float(skip, left):
  model, x = network("mlp")
  quantized = quantize(model, x, skip=skip)
  assert [row.name for row in nn.layer_table(quantized)] == left
  for name in ("first", "middle", "a_last"):
    wanted = nn.Linear if name in left else nnx.Linear
    assert type(getattr(quantized, name)) is wanted


def test_the_first_and_last_layers_are_skipped_by_default():
  model, x = network("mlp")
  quantized = nn.quantize(model, weight=quant.double_rounding(BITS), sample=x)
  assert [row.name for row in nn.layer_table(quantized)] == ["middle"]


@pytest.mark.parametrize(
  "skip", ["head", "mid", ("first", "nothing*"), lambda names: ["x"]]
)
def test_a_skip_rule_that_matches_nothing_lists_the_layers(skip):
  with pytest.raises(ValueError, match="first.*middle.*a_last"):
    quantize(*network("mlp"), skip=skip)


def test_nothing_left_to_quantize_is_an_error():
  with pytest.raises(
    ValueError, match="skip must leave a layer to quantize; the model's"
  ):
    quantize(*network("mlp"), skip="*")


@pytest.mark.parametrize("skip", [(), nn.first_and_last])
def test_a_network_without_layers_is_an_error(skip):
  model = nnx.Sequential(nnx.relu, nnx.BatchNorm(6, rngs=nnx.Rngs(0)))
  with pytest.raises(
    ValueError, match="skip must leave a layer to quantize; the model's"
  ):
    quantize(model, random(5, 6), skip=skip)


def test_a_quantized_network_is_not_quantized_again():
  _, once, x = converted("mlp")
  with pytest.raises(ValueError, match="quantized already"):
    quantize(once, x)


def test_different_bits_for_weights_and_inputs_are_an_error():
  activation = quant.lsq_activation((8, 4))
  with pytest.raises(
    ValueError, match=r"activation\.bits must be the.*got \(8, 4\)"
  ):
    quantize(*network("mlp"), activation=activation)


def test_an_unknown_norm_is_an_error_that_lists_the_known_ones():
  with pytest.raises(ValueError, match="norm must be one of.*got 'layer'"):
    quantize(*network("residual"), norm="layer")


def test_a_sample_that_misses_layers_is_an_error_that_names_them():
  class Branches(Residual):
    def __call__(self, x):
      return self.head(nnx.relu(self.conv(self.stem(x))).mean((1, 2)))

  with pytest.raises(ValueError, match="norm.*shortcut") as error:
    quantize(Branches(nnx.Rngs(0)), random(2, 6, 6, 3))
  assert "stem" not in str(error.value)


@pytest.mark.parametrize("sample", ["images", 3.0, None, ()])
def test_a_sample_without_an_array_is_an_error(sample):
  model, _ = network("mlp")
  with pytest.raises(ValueError, match="sample"):
    quantize(model, sample)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_weight_that_is_not_finite_names_its_layer(bad, quantized):
  model, x = network("mlp")
  model.middle.kernel[...] = model.middle.kernel[...].at[0, 0].set(bad)
  skip = () if quantized else "middle"
  with pytest.raises(
    ValueError, match="weight of layer 'middle' must be finite, but 1"
  ):
    quantize(model, x, skip=skip)


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
@pytest.mark.parametrize("activation", [quant.lsq_activation(BITS), None])
def test_a_sample_that_is_not_finite_is_an_error(bad, activation):
  model, x = network("mlp")
  with pytest.raises(ValueError, match="sample.*'first'.*NaN or infinite"):
    quantize(model, x.at[0, 0].set(bad), activation=activation)


def test_a_network_compiled_from_outside_raises_no_error():
  _, quantized, x = converted("mlp")
  quantized = nnx.clone(quantized)
  quantized.eval()
  np.testing.assert_allclose(
    nnx.jit(lambda m, x: m(x))(quantized, x), quantized(x), rtol=1e-5, atol=1e-6
  )


def test_a_half_quantized_network_is_not_quantized_again():
  model, x = network("mlp")
  once = quantize(model, x, skip=nn.first_and_last)
  with pytest.raises(ValueError, match="quantized already"):
    quantize(once, x)


class Special(nnx.Conv):
  """A user's own convolution."""

  def __call__(self, x):
    return 2 * super().__call__(x)


class WithOthers(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.special = Special(4, 4, (3, 3), rngs=rngs)
    self.general = nnx.LinearGeneral(4, (2, 2), rngs=rngs)

  def __call__(self, x):
    return self.general(self.special(self.conv(x)))


def test_layers_that_stay_float_are_named_in_a_warning():
  message = r"special \(Special, overrides __call__\); quantize replaces"
  x = random(2, 6, 6, 3)
  with pytest.warns(UserWarning, match=message):
    model = quantize(WithOthers(nnx.Rngs(0)), x)
  names = [row.name for row in nn.layer_table(model)]
  assert names == ["conv", "general"]


def test_networks_of_known_layers_give_no_warning():
  model, x = network("separable")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    quantize(model, x)


def test_a_second_array_of_fewer_axes_does_not_set_the_number_of_examples():
  class Lookup(nnx.Module):
    def __init__(self):
      self.linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))

    def __call__(self, inputs):
      return self.linear(inputs["x"]) + inputs["a_table"].sum()

  model = quantize(Lookup(), {"a_table": random(10), "x": random(5, 6)})
  assert nn.layer_table(model)[0].macs == 24


def test_a_sample_without_examples_is_an_error():
  model, _ = network("mlp")
  with pytest.raises(
    ValueError, match=r"sample must be arrays \[batch, \.\.\.\], got no example"
  ):
    quantize(model, jnp.zeros((0, 6)))
