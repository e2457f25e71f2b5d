"""What networks written elsewhere hold: arrays, masks, wrappers, arguments."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from dr_jax import deploy, nn, quant

BITS = (8, 4)
WEIGHTS = [
  name
  for name in quant.NAMES
  if isinstance(quant.get(name), quant.WeightQuantizer)
]


def images(shape=(2, 5, 8), seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def quantize(model, x, **options):
  options = {"weight": quant.double_rounding(BITS), "skip": ()} | options
  return nn.quantize(model, sample=x, **options)


class Tabled(nnx.Module):
  """Plain arrays of either kind, alone and in containers, and a PRNG key."""

  def __init__(self, rngs):
    self.a = nnx.Linear(8, 8, rngs=rngs)
    self.b = nnx.Linear(8, 4, rngs=rngs)
    self.table = images((1, 5, 8))
    self.order = np.arange(5)[::-1].copy()
    self.inside = nnx.List([jnp.full((1, 1, 8), 2.0)])
    self.named = nnx.data({"shift": jnp.ones((1, 1, 4))})
    self.calls = nnx.Variable(jnp.int32(0))

  def __call__(self, x):
    self.calls[...] += 1
    h = self.a(x)[:, self.order] + self.table
    return self.b(h * self.inside[0]) + self.named["shift"]


def test_plain_arrays_travel_with_the_state_of_a_network():
  x, model = images(), Tabled(nnx.Rngs(0))
  for network in (model, quantize(model, x)):
    split = nn.functional(network)
    assert split.batch_stats["table"].shape == (1, 5, 8)
    assert split.batch_stats["inside"]["0"].shape == (1, 1, 8)
    assert split.batch_stats["named"]["shift"].shape == (1, 1, 4)
    got, stats = jax.jit(split.apply)(split.params, split.batch_stats, 0, x)
    np.testing.assert_allclose(got, network(x), rtol=1e-5, atol=1e-5)
    assert stats["calls"] == 1
    changed = split.batch_stats | {"table": jnp.zeros((1, 5, 8))}
    nn.update(network, params=split.params, batch_stats=changed)
    assert not network.table.any()


def test_plain_arrays_are_stored_and_loaded(tmp_path):
  x = images()
  network = quantize(Tabled(nnx.Rngs(0)), x)
  deploy.save(tmp_path / "model", network)
  other = Tabled(nnx.Rngs(7))
  other.table, other.order = jnp.zeros((1, 5, 8)), np.arange(5)
  loaded = deploy.load(tmp_path / "model", model=other)
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.set_bits(loaded, bits)
    np.testing.assert_array_equal(loaded(x), network(x))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_masked_convolution_decodes_to_what_it_computed_with(name, tmp_path):
  weight = quant.get(name)
  mask = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 3, 4, 8))
  mask = mask.astype(jnp.float32)

  def build():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Conv(4, 8, (3, 3), mask=mask, rngs=rngs))

  x = images((1, 4, 4, 4))
  network = quantize(build(), x, weight=weight)
  deploy.save(tmp_path / "model", network)
  loaded = deploy.load(tmp_path / "model", model=build())
  layer = network.layers[0]
  params = nn.bits.arrays_of(layer.weight_params)
  for index, bits in enumerate(weight.bits):
    nn.set_bits(loaded, bits)
    expected = weight.fake_quantize(params, layer.kernel[...] * mask, index)
    np.testing.assert_array_equal(loaded.layers[0].kernel, expected)


def test_a_requantized_masked_convolution_starts_from_the_masked_kernel():
  mask = jnp.zeros((1, 1, 4, 8)).at[:, :, 0].set(1)
  conv = nnx.Conv(4, 8, (1, 1), mask=mask, rngs=nnx.Rngs(0))
  network = quantize(nnx.Sequential(conv), images((1, 2, 2, 4)))
  weight = quant.lsq(BITS)
  got = nn.requantize(network, weight=weight).layers[0].weight_params["scale"]
  expected = weight.init(conv.kernel[...] * mask)["scale"]
  np.testing.assert_allclose(got[...], expected, rtol=1e-6)


class Sowing(nnx.Module):
  def __init__(self, rngs):
    self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x):
    h = nnx.relu(self.a(x))
    self.sow(nnx.Intermediate, "h", h)
    return self.b(h)


def sowing():
  return quantize(
    Sowing(nnx.Rngs(0)), images((2, 8)), activation=quant.lsq_activation(BITS)
  )


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_a_quantized_network_is_captured_and_tabulated_as_a_float_one():
  x = images((2, 8))
  network, model = sowing(), Sowing(nnx.Rngs(0))
  y, captured = nnx.capture(network, nnx.Intermediate)(x)
  np.testing.assert_array_equal(y, network(x))
  assert captured["h"].get_value()[0].shape == (2, 8)
  rows = nnx.tabulate(model, x, console_kwargs={"width": 200})
  quantized = nnx.tabulate(network, x, console_kwargs={"width": 200})
  assert "Sowing" in rows
  assert "Sowing" in quantized and "Linear" in quantized


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_a_call_sowed_is_not_part_of_a_network(tmp_path):
  x, network = images((2, 8)), sowing()
  y = network(x)  # leaves an intermediate in the module
  split = nn.functional(network)
  assert "h" not in split.batch_stats
  got, _ = split.apply(split.params, split.batch_stats, 0, x)
  np.testing.assert_array_equal(got, y)
  nn.update(network, params=split.params, batch_stats=split.batch_stats)
  deploy.save(tmp_path / "model", network)
  loaded = deploy.load(tmp_path / "model", model=Sowing(nnx.Rngs(0)))
  np.testing.assert_array_equal(loaded(x), y)


def normalized(factor):
  """A network whose float output does not depend on the factor."""
  wrapper = nnx.WeightNorm(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
  wrapper.layer_instance.kernel[...] *= factor
  return nnx.Sequential(wrapper)


@pytest.mark.parametrize("init", ["published", "max", "mse"])
def test_scales_fit_the_kernel_that_weight_normalization_computes(init):
  x = images((16, 8))
  y = normalized(1)(x)
  errors = []
  for factor in (1.0, 10.0, 100.0):
    network = quantize(normalized(factor), x, init=init)
    errors.append(float(jnp.abs(network(x) - y).max() / jnp.abs(y).max()))
  # Max-abs int8 on the normalized kernel has 0.0035.
  assert max(errors) < (0.01 if init == "published" else 0.005)
  np.testing.assert_allclose(errors, errors[0], rtol=1e-3)


def test_a_weight_normalized_layer_is_stored_as_it_computes(tmp_path):
  x = images((16, 8))
  network = quantize(normalized(10.0), x)
  deploy.save(tmp_path / "model", network)
  loaded = deploy.load(tmp_path / "model", model=normalized(1.0))
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.set_bits(loaded, bits)
    np.testing.assert_allclose(loaded(x), network(x), rtol=1e-5, atol=1e-6)


class Spectral(nnx.Module):
  def __init__(self, rngs):
    self.a = nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
    self.b = nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x):
    return self.b(self.a(x, update_stats=False))


def test_a_spectrally_normalized_layer_stays_float_with_a_warning():
  x = images((2, 8))
  with pytest.warns(
    UserWarning, match=r"a/layer_instance \(Linear, is in Spectral"
  ):
    network = quantize(Spectral(nnx.Rngs(0)), x)
  assert [row.name for row in nn.layer_table(network)] == ["b"]
  assert network(x).shape == (2, 4)


class Attentive(nnx.Module):
  """Takes what public networks take: dropout, masks, a mode."""

  def __init__(self, rngs):
    self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5)

  def __call__(self, x, *, mask, deterministic, rngs=None):
    h = self.norm(self.a(x)) * mask
    return self.b(self.dropout(h, deterministic=deterministic, rngs=rngs))


def attentive(**options):
  mask = jnp.ones((2, 8)).at[:, 0].set(0)
  return nn.Inputs(images((2, 8)), mask=mask, **options)


def test_keyword_arguments_reach_the_network_everywhere():
  model = Attentive(nnx.Rngs(0))
  plain = attentive(deterministic=True)
  network = quantize(model, plain)
  random = quantize(model, attentive(deterministic=False, rngs=nnx.Rngs(1)))
  assert len(nn.layer_table(network)) == len(nn.layer_table(random)) == 2
  nn.recalibrate(network, [plain, plain])
  mean = network.norm.mean[0]
  expected = network.a(plain.args[0]).mean(0)
  np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6)
  network.eval()
  split = nn.functional(network)
  got, _ = split.apply(
    split.params, split.batch_stats, 0, *plain.args, **plain.kwargs
  )
  np.testing.assert_allclose(
    got, network(*plain.args, **plain.kwargs), rtol=1e-5, atol=1e-6
  )


class Moded(nnx.Module):
  def __init__(self, rngs):
    self.a = nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x, train):
    return self.a(x) + (1.0 if train else 0.0)


def test_apply_tells_a_network_that_asks_whether_it_is_in_training():
  x = images((2, 8))
  split = nn.functional(quantize(Moded(nnx.Rngs(0)), nn.Inputs(x, train=False)))
  scoring, _ = split.apply(split.params, split.batch_stats, 0, x)
  training, _ = split.apply(split.params, split.batch_stats, 0, x, train=True)
  np.testing.assert_allclose(training, scoring + 1, rtol=1e-6)


def test_calibration_keeps_no_tracer():
  model = nnx.Sequential(
    nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1))
  )
  with jax.checking_leaks():
    network = quantize(
      model, images((4, 8)), activation=quant.lsq_activation(BITS)
    )
  assert [row.macs for row in nn.layer_table(network)] == [64, 32]


def test_batches_of_other_sizes_do_not_change_costs():
  model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
  network = quantize(
    model, images((4, 8)), batches=[images((4, 8)), images((3, 8))]
  )
  assert [row.macs for row in nn.layer_table(network)] == [64]


class Slashed(nnx.Module):
  def __init__(self, rngs):
    linear = nnx.Linear(8, 8, rngs=rngs)
    inner = nnx.Dict({"b": nnx.Linear(8, 4, rngs=rngs)})
    self.d = nnx.Dict({"a/b": linear, "a": inner})

  def __call__(self, x):
    return self.d["a"]["b"](self.d["a/b"](x))


def test_two_layers_at_one_path_are_both_named():
  with pytest.raises(ValueError, match=r"'d/a/b'.*\('d', 'a', 'b'\).*'a/b'\)"):
    quantize(Slashed(nnx.Rngs(0)), images((2, 8)))


@pytest.mark.parametrize(
  "model", [linen.Dense(4), lambda x: x, None, {"kernel": np.ones((8, 4))}]
)
def test_what_is_not_an_nnx_module_is_refused(model):
  with pytest.raises(ValueError, match=r"must be a flax\.nnx\.Module, got"):
    quantize(model, images((2, 8)))


def test_no_warning_is_given_where_all_is_quantized():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    quantize(Tabled(nnx.Rngs(0)), images())
