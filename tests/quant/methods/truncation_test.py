"""Truncation-ready codes against integer arithmetic and numpy formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant

EVERY = (8, 7, 6, 5, 4, 3, 2)
SCALES = np.array([[0.25, 0.1, 3.7e4]], np.float32)


def over_bits(function, bits):
  """Runs function(..., index) for every index, in one compilation."""
  run = jax.jit(jax.vmap(function, (None, None, 0)))
  return lambda params, w: np.asarray(run(params, w, jnp.arange(len(bits))))


def test_every_truncated_code_decodes_to_the_midpoint_of_its_bin():
  quantizer = quant.truncation(EVERY)
  codes = np.arange(-128, 128)
  encoded = {
    "codes": np.tile(codes[:, None], 3).astype(np.int8),
    "scale": SCALES,
  }
  decode = jax.jit(jax.vmap(quantizer.decode, (None, 0)))
  values = decode(encoded, jnp.arange(len(EVERY)))
  # Middles of the intervals: inside them, floors are safe from rounding.
  w = (codes[:, None] + np.float32(0.5)) * SCALES
  faked = over_bits(quantizer.fake_quantize, EVERY)({"scale": SCALES}, w)
  for i, bits in enumerate(EVERY):
    step = 2 ** (8 - bits)
    # Two exact factors, one float32 product.
    middles = ((codes >> (8 - bits)) + np.float32(0.5)).astype(np.float32)
    expected = middles[:, None] * (SCALES * np.float32(step))
    np.testing.assert_array_equal(values[i], expected)
    np.testing.assert_array_equal(faked[i], expected)


def test_truncquant_by_hand_at_four_and_two_bits():
  quantizer = quant.truncation((4, 2))
  params = {"scale": jnp.ones((1,))}
  w = np.array([-9.0, -8.0, -4.1, -4.0, -0.1, 0.0, 0.9, 3.9, 4.0, 8.5], "f4")
  four = [-7.5, -7.5, -4.5, -3.5, -0.5, 0.5, 0.5, 3.5, 4.5, 7.5]
  two = [-6.0, -6.0, -6.0, -2.0, -2.0, 2.0, 2.0, 2.0, 6.0, 6.0]
  np.testing.assert_array_equal(quantizer.fake_quantize(params, w, 0), four)
  np.testing.assert_array_equal(quantizer.fake_quantize(params, w, 1), two)
  codes = quantizer.encode(params, w)["codes"]
  assert codes.dtype == jnp.int8
  np.testing.assert_array_equal(codes, [-8, -8, -5, -4, -1, 0, 0, 3, 4, 7])


def test_truncating_codes_equals_rounding_down_at_the_lower_bit_width():
  w = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) / 4
  scale = np.float32(2.0**-8)  # w / scale is exact
  faked = over_bits(quant.truncation(EVERY).fake_quantize, EVERY)(
    {"scale": np.full((1, 1), scale)}, w
  )
  for i, bits in enumerate(EVERY):
    unit = np.float64(scale) * 2 ** (8 - bits)
    direct = np.clip(
      np.floor(w / unit), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    )
    np.testing.assert_array_equal(faked[i], ((direct + 0.5) * unit))
    inside = np.abs(w) < 0.5
    assert 0.9 < inside.mean() < 1
    # The middle is at most half a level away: floors alone, a whole one.
    assert np.abs(faked[i] - w)[inside].max() <= unit / 2


@pytest.mark.parametrize("index", range(3))
def test_truncquant_gradients_follow_the_formulas_at_and_beyond_the_ends(index):
  bits = (8, 4, 2)
  quantizer = quant.truncation(bits)
  scale = np.float32(2.0**-5)
  step = 2.0 ** (8 - bits[index])
  ends = np.array([-128.0, 127.0, 127.5, 128.0], np.float32)
  neighbors = [np.nextafter(ends, np.float32(s * np.inf)) for s in (-1, 1)]
  v = np.concatenate([np.arange(-140, 140, 0.75), ends, *neighbors])
  v = v.astype(np.float32)
  w = v * scale
  g = np.random.default_rng(0).normal(size=w.shape).astype(np.float32)
  _, pull = jax.vjp(
    lambda s, w: quantizer.fake_quantize({"scale": s}, w, index),
    jnp.full((1,), scale),
    w,
  )
  dscale, dw = pull(g)
  inside = (v >= -128) & (v <= 128)
  np.testing.assert_array_equal(dw, np.where(inside, g, 0))
  high = 2 ** (bits[index] - 1) - 1
  v = v.astype(np.float64) / step
  middle = np.clip(np.floor(v), -high - 1, high) + 0.5
  slope = np.where(inside, middle - v, middle)
  expected = (g * slope).sum() * step / math.sqrt(v.size * high)
  np.testing.assert_allclose(dscale[0], expected, rtol=1e-4)


@pytest.mark.parametrize("per_channel", [True, False])
def test_truncquant_starts_at_the_scale_of_double_rounding(per_channel):
  w = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32)
  options = {"bits": (7, 3), "per_channel": per_channel}
  found = quant.truncation(**options).init(w)["scale"]
  expected = quant.double_rounding(**options).init(w)["scale"]
  np.testing.assert_array_equal(found, expected)


def exact_slices(codes, from_bits, bits, extra_precision):
  """Integers: rounds to `bits` bits, halves to even, and shifts back."""
  step = 2 ** (from_bits - bits)
  rounded = np.rint(codes / step).astype(int)
  extra = extra_precision and bits < from_bits
  return np.minimum(rounded, 2**bits - (0 if extra else 1)) * step


@pytest.mark.parametrize("extra_precision", [False, True])
@pytest.mark.parametrize("highest", [8, 5, 3])
def test_every_matquant_code_is_sliced_as_in_integer_arithmetic(
  highest, extra_precision
):
  bits = tuple(range(highest, 1, -1))
  quantizer = quant.truncation(
    bits, scheme="matquant", extra_precision=extra_precision
  )
  codes = np.arange(2**highest)
  zero_points = np.array([0, 2 ** (highest - 1) - 1, 2**highest - 1])
  # Every code in each channel, which so spans the whole range.
  w = ((codes[:, None] - zero_points) * 2.0**-3).astype(np.float32)
  encoded = quantizer.encode({}, w)
  assert encoded["codes"].dtype == jnp.uint8
  np.testing.assert_array_equal(encoded["codes"], np.tile(codes[:, None], 3))
  np.testing.assert_array_equal(encoded["zero_point"], zero_points[None])
  np.testing.assert_allclose(encoded["scale"], np.full((1, 3), 2.0**-3), 1e-6)
  faked = over_bits(quantizer.fake_quantize, bits)({}, w)
  for i, b in enumerate(bits):
    sliced = exact_slices(codes, highest, b, extra_precision)
    expected = (sliced[:, None] - zero_points) * 2.0**-3
    np.testing.assert_allclose(faked[i], expected, rtol=1e-6)
    levels = 2**b + (1 if extra_precision and b < highest else 0)
    assert len(np.unique(faked[i][:, 0])) == levels


def test_matquant_by_hand_rounds_halves_to_even_and_clamps():
  w = np.array([0, 31, 32, 53, 96, 223, 224, 255], np.float32)[:, None]
  for extra, top in ((False, 192), (True, 256)):
    quantizer = quant.truncation(
      (8, 2), scheme="matquant", extra_precision=extra
    )
    # 32, 96 and 224 are ties: half up would send 32 to 64.
    expected = np.array([0, 0, 0, 64, 128, 192, top, top])[:, None]
    found = quantizer.fake_quantize({}, w, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("per_channel", [True, False])
def test_matquant_matches_a_float64_formula_on_random_kernels(per_channel):
  bits = (8, 6, 4, 2)
  rng = np.random.default_rng(1)
  w = (rng.normal(size=(3, 3, 5, 6)) + 0.5 * rng.normal(size=6)).astype("f4")
  axes = (0, 1, 2) if per_channel else None
  w64 = w.astype(np.float64)
  low = w64.min(axes, keepdims=True)
  scale = (w64.max(axes, keepdims=True) - low) / 255
  zero_point = np.rint(-low / scale)
  # Nothing near a tie, where float32 and float64 may differ.
  away = np.abs(w64 / scale % 1 - 0.5) > 1e-3
  assert away.mean() > 0.99
  codes = np.clip(np.rint(w64 / scale) + zero_point, 0, 255)
  quantizer = quant.truncation(bits, scheme="matquant", per_channel=per_channel)
  faked = over_bits(quantizer.fake_quantize, bits)({}, w)
  for i, b in enumerate(bits):
    expected = (exact_slices(codes, 8, b, False) - zero_point) * scale
    np.testing.assert_allclose(
      faked[i][away], expected[away], rtol=1e-5, atol=1e-6
    )


def test_matquant_clips_the_top_code_of_a_range_that_ends_on_ties():
  quantizer = quant.truncation((2,), scheme="matquant")
  w = np.array([[-1.5], [0.0], [1.5]], np.float32)
  encoded = quantizer.encode({}, w)
  # z = round(1.5) = 2, and round(1.5) + 2 is one too many for two bits.
  np.testing.assert_array_equal(encoded["codes"], [[0], [2], [3]])
  np.testing.assert_array_equal(encoded["zero_point"], [[2]])
  np.testing.assert_allclose(quantizer.decode(encoded, 0), [[-2], [0], [1]])


def test_matquant_keeps_zeros_at_the_highest_bit_width():
  w = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
  w[::7] = 0
  quantizer = quant.truncation(scheme="matquant")
  faked = quantizer.fake_quantize(quantizer.init(w), w, 0)
  np.testing.assert_array_equal(faked[::7], np.zeros_like(w[::7]))


@pytest.mark.parametrize(
  "low, high",
  [
    (0.0, 0.0),
    (-2.0, -2.0),
    (5.0, 5.0 + 1e-5),
    (1e6, 1e6 + 1),
    (-1e-28, 1e-28),
    (-3e38, 3e38),
    (3e38, 3.4e38),
    (-1e38, 3.402e38),  # the level above the largest weight is infinite
  ],
)
def test_matquant_handles_constant_one_sided_tiny_and_huge_channels(low, high):
  w = np.linspace(low, high, 9, dtype=np.float64).astype(np.float32)[:, None]
  largest = np.abs(w.astype(np.float64)).max()
  # The scale, which is no finer than float32 is at the largest weight.
  scale = max((np.float64(w.max()) - w.min()) / 255, largest * 2.0**-24)
  for extra in (False, True):
    quantizer = quant.truncation(
      (8, 4), scheme="matquant", extra_precision=extra
    )
    for i, level in enumerate((1, 16)):
      faked = np.asarray(quantizer.fake_quantize({}, w, i), np.float64)
      assert np.isfinite(faked).all()
      # Half a step to the code; half a level to its slice, a whole one where
      # that clamps; an ulp or two in the zero point and in the product.
      allowed = (0.51 + level) * scale + 3e-7 * largest
      assert np.abs(faked - w).max() <= allowed


@pytest.mark.parametrize("extra_precision", [False, True])
def test_matquant_gradients_pass_straight_through_for_every_weight(
  extra_precision,
):
  quantizer = quant.truncation(
    scheme="matquant", extra_precision=extra_precision
  )
  w = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
  g = np.random.default_rng(1).normal(size=w.shape).astype(np.float32)
  for dtype in (jnp.float32, jnp.bfloat16):
    for index in range(4):
      _, pull = jax.vjp(
        lambda w, i=index: quantizer.fake_quantize({}, w, i), w.astype(dtype)
      )
      (dw,) = pull(g.astype(dtype))
      assert dw.dtype == dtype
      np.testing.assert_array_equal(dw, g.astype(dtype))


def test_a_matquant_copy_with_extra_precision_costs_one_bit_more():
  w = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
  per_channel = 5 * (4 + 4)  # a float32 scale and an int32 zero point
  for extra, each in ((False, (8, 6, 4, 2)), (True, (8, 7, 5, 3))):
    quantizer = quant.truncation(scheme="matquant", extra_precision=extra)
    encoded = quantizer.encode({}, w)
    assert set(encoded) == {"codes", "scale", "zero_point"}
    sizes = [quantizer.storage.size(encoded, i) for i in range(4)]
    assert sizes == [w.size * bits // 8 + per_channel for bits in each]
    assert quantizer.stored_bits == 8


def test_sign_may_be_given_if_it_is_that_of_the_scheme():
  w = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
  for scheme, sign, dtype in (
    ("truncquant", True, jnp.int8),
    ("matquant", False, jnp.uint8),
  ):
    for signed in (None, sign):
      quantizer = quant.truncation(scheme=scheme, signed=signed)
      encoded = quantizer.encode(quantizer.init(w), w)
      assert encoded["codes"].dtype == dtype
      assert dict(quantizer.options)["signed"] is signed


@pytest.mark.parametrize(
  "options, message",
  [
    ({"bits": (8, 1)}, r"bits of truncation .*from 8 down to 2.*\(8, 1\)"),
    ({"bits": (4, 4)}, r"highest first, got \(4, 4\)"),
    ({"scheme": "floor"}, "scheme .*truncquant.*matquant.*got 'floor'"),
    (
      {"scheme": "matquant", "signed": True},
      "signed must be None or False for matquant, got True",
    ),
    (
      {"signed": False},
      "signed must be None or True for truncquant, got False",
    ),
    (
      {"extra_precision": True},
      "extra_precision must be False for truncquant.*matquant",
    ),
  ],
)
def test_truncation_names_the_wrong_option(options, message):
  with pytest.raises(ValueError, match=message):
    quant.truncation(**options)
