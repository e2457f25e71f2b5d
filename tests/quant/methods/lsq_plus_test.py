"""LSQ+ against formulas in float64 and hand-derived gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant

BITS = (8, 5, 4, 2)


@pytest.mark.parametrize("per_channel", [True, False])
def test_weight_scales_start_at_three_standard_deviations_per_bit_width(
  per_channel,
):
  rng = np.random.default_rng(0)
  w = (rng.normal(size=(3, 3, 4, 6)) + rng.normal(size=6)).astype(np.float32)
  axes = (0, 1, 2) if per_channel else (0, 1, 2, 3)
  mean = w.astype(np.float64).mean(axes, keepdims=True)
  std = w.astype(np.float64).std(axes, keepdims=True)
  bound = np.maximum(np.abs(mean - 3 * std), np.abs(mean + 3 * std))
  scale = quant.lsq_plus(BITS, per_channel=per_channel).init(w)["scale"]
  assert scale.dtype == jnp.float32
  expected = np.stack([bound / 2 ** (b - 1) for b in BITS])
  np.testing.assert_allclose(scale, expected, rtol=1e-5)


def test_weights_are_quantized_as_by_lsq():
  w = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32)
  plus, plain = quant.lsq_plus(BITS), quant.lsq(BITS)
  params = plus.init(w)
  assert (params["scale"] != plain.init(w)["scale"]).all()
  for index in range(4):
    expected = jax.vjp(lambda w, i=index: plain.fake_quantize(params, w, i), w)
    found = jax.vjp(lambda w, i=index: plus.fake_quantize(params, w, i), w)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1](w)[0], expected[1](w)[0])
  assert plus.stored_bits == 32
  assert quant.lsq_plus((4,)).stored_bits == 4


def value_and_gradients(quantizer, params, x, g, index):
  @jax.jit
  def run(params, x, g):
    out, pull = jax.vjp(
      lambda p, x: quantizer.fake_quantize(p, x, index), params, x
    )
    return out, *pull(g)

  return run(params, x, g)


@pytest.mark.parametrize("index", range(4))
def test_activations_and_gradients_match_the_formulas_at_and_beyond_the_ends(
  index,
):
  high = 2.0 ** BITS[index] - 1
  scale, offset = 2.0**-3, -0.75  # all of v is then exact
  v = np.arange(-4, high + 4.25, 0.25)
  x = (v * scale + offset).astype(np.float32)
  ends = np.array([offset, high * scale + offset], np.float32)
  neighbors = [np.nextafter(ends, np.float32(s * np.inf)) for s in (-1, 1)]
  x = np.concatenate([x, *neighbors]).astype(np.float32)
  g = np.random.default_rng(index).normal(size=x.shape).astype(np.float32)
  params = {
    "scale": jnp.full((4,), 9.0).at[index].set(scale),
    "offset": jnp.full((4,), 9.0).at[index].set(offset),
  }
  quantizer = quant.lsq_plus_activation(BITS)
  out, dparams, dx = value_and_gradients(quantizer, params, x, g, index)
  v = (x.astype(np.float64) - offset) / scale
  code = np.clip(np.rint(v), 0, high)
  np.testing.assert_array_equal(out, (code * scale + offset).astype("f4"))
  inside = (v >= 0) & (v <= high)
  np.testing.assert_array_equal(dx, np.where(inside, g, 0))
  factor = 1 / math.sqrt(x.size * high)
  expected = {
    "scale": (g * np.where(inside, code - v, code)).sum() * factor,
    "offset": (g * ~inside).sum() * factor,
  }
  # A float32 sum of terms as large as the end codes.
  tolerance = 1e-6 * np.abs(g).sum() * high * factor
  for name, value in expected.items():
    np.testing.assert_allclose(
      dparams[name][index], value, rtol=1e-5, atol=tolerance
    )
    assert (np.delete(dparams[name], index) == 0).all()


@pytest.mark.parametrize("index", range(4))
def test_activations_match_a_float64_formula_for_any_scale_and_offset(index):
  rng = np.random.default_rng(index)
  x = rng.normal(size=(64, 33)).astype(np.float32)
  params = {
    "scale": (0.3 / np.array([64, 8, 4, 1])).astype(np.float32),
    "offset": np.array([-0.31, -0.29, -0.3, 0.2], np.float32),
  }
  scale, offset = (np.float64(params[k][index]) for k in ("scale", "offset"))
  high = 2 ** BITS[index] - 1
  v = (x - offset) / scale
  # Nothing near a tie, where float32 and float64 may differ.
  away = np.abs(v % 1 - 0.5) > 1e-3
  assert away.mean() > 0.99
  expected = np.clip(np.rint(v), 0, high) * scale + offset
  quantizer = quant.lsq_plus_activation(BITS)
  found = jax.jit(quantizer.fake_quantize)(params, x, jnp.int32(index))
  np.testing.assert_allclose(found[away], expected[away], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["conv", "lin"])
def test_activations_without_an_offset_match_pytorch(golden, name):
  arrays = golden("lsq_torch_builtin.npz")
  bits = tuple(sorted(map(int, arrays["bits"]), reverse=True))
  x, g = arrays[f"a.{name}.in"], arrays[f"gout.{name}"]
  keys = [f"a.{name}.b{b}" for b in bits]
  params = {
    "scale": np.array([arrays[f"{key}.scale"] for key in keys]),
    "offset": np.zeros(len(bits), np.float32),
  }
  quantizer = quant.lsq_plus_activation(bits)
  for i, key in enumerate(keys):
    out, dparams, dx = value_and_gradients(quantizer, params, x, g, i)
    for found, wanted in (
      (out, arrays[f"{key}.out"]),
      (dx, arrays[f"{key}.gin"]),
      (dparams["scale"][i], arrays[f"{key}.gscale"]),
    ):
      np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_activation_parameters_start_at_the_ends_of_the_batch():
  x = np.random.default_rng(0).normal(size=(16, 9)).astype(np.float32)
  params = quant.lsq_plus_activation(BITS).init(x)
  highs = 2.0 ** np.array(BITS) - 1
  expected = (np.float64(x.max()) - x.min()) / highs
  np.testing.assert_allclose(params["scale"], expected, rtol=1e-6)
  np.testing.assert_array_equal(params["offset"], np.full(4, x.min()))
  assert {p.dtype for p in params.values()} == {jnp.dtype("float32")}


def test_the_sign_of_the_inputs_makes_no_difference():
  x = np.random.default_rng(0).normal(size=(16, 9)).astype(np.float32)
  undecided = quant.lsq_plus_activation(BITS)
  params = undecided.init(x)
  for sign in (True, False):
    quantizer = undecided.with_sign(sign)
    assert quantizer.signed is False
    assert dict(quantizer.options) == {"bits": BITS, "signed": sign}
    for name, value in quantizer.init(x).items():
      np.testing.assert_array_equal(value, params[name])
    np.testing.assert_array_equal(
      quantizer.fake_quantize(params, x, 3),
      undecided.fake_quantize(params, x, 3),
    )


@pytest.mark.parametrize("scale", [-3.0, 0.0, 1e-38, 1e38])
@pytest.mark.parametrize("offset", [-1e38, 0.0, 1e38])
def test_any_finite_parameters_give_finite_values_and_gradients(scale, offset):
  x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
  quantizer = quant.lsq_plus_activation((8, 2))
  params = {"scale": jnp.full(2, scale), "offset": jnp.full(2, offset)}
  read = {
    "scale": jnp.clip(params["scale"], quant.SCALE_MIN, quant.SCALE_MAX),
    "offset": jnp.clip(params["offset"], -(2.0**38), 2.0**38),
  }
  for index in range(2):
    found = value_and_gradients(quantizer, params, x, x, index)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(
      found[0], quantizer.fake_quantize(read, x, index)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinite_calibration_inputs_are_an_error(bad):
  x = np.ones((4, 3), np.float32)
  x[1, 1] = bad
  with pytest.raises(
    ValueError, match="activation must be finite.*1 of 12 values are NaN"
  ):
    quant.lsq_plus_activation((8, 4)).init(x)


@pytest.mark.parametrize("factory", [quant.lsq_plus, quant.lsq_plus_activation])
def test_wrong_bits_are_an_error_that_names_the_method(factory):
  name = factory.__name__
  with pytest.raises(
    ValueError, match=rf"bits of {name} must be .*8 down to 2.*\(8, 1\)"
  ):
    factory((8, 1))
