"""Initial parameters fitted to an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant

BITS = (8, 6, 4, 2)
WEIGHTS = ("double_rounding", "lsq", "lsq_plus", "bit_mixer", "truncation")
INPUTS = ("lsq_activation", "lsq_plus_activation", "pact_activation")


@pytest.fixture(scope="module")
def w():
  return jax.random.laplace(jax.random.key(0), (64, 16))


def errors(quantizer, params, x):
  quantized = [
    quantizer.fake_quantize(params, x, i) for i in range(len(quantizer.bits))
  ]
  return np.array([float(jnp.square(q - x).mean()) for q in quantized])


def max_abs(x, bits, axis):
  """The plain symmetric quantizer that others start from."""
  top = 2 ** (bits - 1) - 1
  scale = np.abs(x).max(axis) / top
  return np.clip(np.round(x / scale), -top, top) * scale


@pytest.mark.parametrize("name", WEIGHTS)
def test_max_reaches_the_ends_of_every_channel(name, w):
  quantizer = quant.get(name, bits=BITS)
  params = quant.fit(quantizer, w, "max")
  w_hat = quantizer.fake_quantize(params, w, 0)
  scale = params["scale"].reshape(-1, 1, 16)[0]
  assert float(jnp.max(jnp.abs(w_hat - w) / scale)) <= 1.001 * (
    1.0 if name == "bit_mixer" else 0.5
  )


def costs(quantizer, params, w):
  """Squared errors [B, c_out], what shrinks the weight counting as 30 times."""
  found = []
  for i in range(len(quantizer.bits)):
    error = np.asarray(quantizer.fake_quantize(params, w, i), np.float64) - w
    along = np.square((error * w).sum(0)) / np.square(w).sum(0)
    found.append(np.square(error).sum(0) + 30 * along)
  return np.stack(found)


@pytest.mark.parametrize("name", ["lsq", "lsq_plus"])
def test_every_bit_width_has_the_least_cost(name, w):
  quantizer, w = quant.get(name, bits=BITS), np.asarray(w, np.float64)
  params = {init: quant.fit(quantizer, w, init) for init in quant.INITS}
  least = costs(quantizer, params.pop("mse"), w)
  for others in params.values():
    # Ranges are compared in steps of 9 %, where one channel's cost is rough.
    assert (least.sum(1) <= 1.05 * costs(quantizer, others, w).sum(1)).all()


@pytest.mark.parametrize("name", ["double_rounding", "bit_mixer", "truncation"])
def test_a_shared_scale_is_good_at_the_highest_bit_width(name, w):
  quantizer, w = quant.get(name, bits=BITS), np.asarray(w, np.float64)
  least = np.min(
    [
      costs(quantizer, quant.fit(quantizer, w, init), w)[0]
      for init in quant.INITS
    ],
    0,
  )
  fitted = costs(quantizer, quant.fit(quantizer, w, "mse"), w)
  assert fitted[0].sum() <= 1.25 * least.sum()


def test_each_bit_width_has_its_own_least_error_where_it_has_a_scale(w):
  quantizer = quant.lsq(BITS)
  together = quant.fit(quantizer, w, "mse")["scale"]
  for i, bits in enumerate(BITS):
    alone = quant.fit(quant.lsq((bits,)), w, "mse")["scale"]
    np.testing.assert_array_equal(together[i], alone[0])


def test_double_rounding_is_better_than_max_abs_at_every_bit_width(w):
  quantizer = quant.double_rounding(BITS)
  ours = errors(quantizer, quant.fit(quantizer, w, "mse"), w)
  plain = [np.square(max_abs(np.asarray(w), b, 0) - w).mean() for b in BITS]
  assert ours[0] <= 1.2 * plain[0]
  assert ours[2] < plain[2] and ours[3] < plain[3]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("signed", [False, True])
def test_inputs_of_either_sign_are_fitted(name, signed):
  x = jax.random.normal(jax.random.key(1), (4, 500))
  x = x if signed else jnp.abs(x)
  quantizer = quant.get(name, bits=BITS, signed=signed)
  wide = quant.fit(quantizer, x, "max")
  assert float(jnp.abs(quantizer.fake_quantize(wide, x, 0) - x).max()) < 0.03
  least = errors(quantizer, quant.fit(quantizer, x, "mse"), x)
  assert (least <= 1.001 * errors(quantizer, wide, x)).all()


def test_a_percentile_leaves_an_outlier_out(w):
  w = w.at[0, 0].set(1000.0)
  narrow = quant.lsq((4,), per_channel=False)
  everything = quant.fit(narrow, w, "max")["scale"]
  most = quant.fit(narrow, w, "percentile")["scale"]
  assert float(everything.max()) > 140 and float(most.max()) < 140


def test_methods_without_a_range_start_as_published(w):
  for name in ("adabits", "bitwave", "multi_resolution"):
    quantizer = quant.get(name)
    fitted, published = quant.fit(quantizer, w, "mse"), quantizer.init(w)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, fitted, published))


@pytest.mark.parametrize("init", ["lsq", "", None, 3])
def test_an_unknown_init_is_refused(init, w):
  with pytest.raises(ValueError, match="init must be one of"):
    quant.fit(quant.lsq(BITS), w, init)


@pytest.mark.parametrize("init", quant.INITS)
def test_constant_arrays_have_finite_scales(init):
  for name in WEIGHTS:
    quantizer = quant.get(name, bits=BITS)
    for value in (0.0, 1.0, -1.0, 1e30, 1e-30):
      params = quant.fit(quantizer, jnp.full((4, 2), value), init)
      assert bool(jnp.isfinite(params["scale"]).all())
      assert float(params["scale"].min()) > 0
