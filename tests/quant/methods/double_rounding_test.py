"""Double Rounding against exact integers and hand-derived gradients."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant

ROUNDINGS = ("half_even", "half_up", "floor")
HIGHEST = range(2, 9)

# A power of two, a short mantissa, and some with no short form in binary.
SCALES = np.array([[0.25, 0.7001953125, 0.1, 1e-6, 3.7e4]], np.float32)


def exact_round(x: Fraction, rounding: str) -> int:
  match rounding:
    case "half_even":
      return round(x)
    case "half_up":
      return math.floor(x + Fraction(1, 2))
    case "floor":
      return math.floor(x)
  raise AssertionError(rounding)


def exact_clip(q: int, bits: int) -> int:
  return min(max(q, -(1 << (bits - 1))), (1 << (bits - 1)) - 1)


def exact_switch(q: int, from_bits: int, to_bits: int, rounding: str) -> int:
  low = exact_round(Fraction(q, 1 << (from_bits - to_bits)), rounding)
  return exact_clip(low, to_bits)


def all_codes(bits: int) -> range:
  return range(-(1 << (bits - 1)), 1 << (bits - 1))


def exact_table(h: int, rounding: str) -> np.ndarray:
  """[h - 1, 2^h] codes at h, h-1, ..., 2 bits of every h-bit code."""
  return np.array(
    [
      [exact_switch(q, h, b, rounding) for q in all_codes(h)]
      for b in range(h, 1, -1)
    ]
  )


def every_lower(h: int) -> tuple[int, ...]:
  return tuple(range(h, 1, -1))


def steps_of(h: int) -> np.ndarray:
  return np.array([[2.0 ** (h - b)] for b in every_lower(h)], np.float32)


def over_bits(function, quantizer):
  """Runs function(..., index) for every index, in one compilation."""
  indices = jnp.arange(len(quantizer.bits))
  return lambda *arrays: np.asarray(
    jax.jit(jax.vmap(function, (None, None, 0)))(*arrays, indices)
  )


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("from_bits", HIGHEST)
def test_switch_codes_equals_exact_arithmetic_for_every_code(
  from_bits, rounding
):
  codes = jnp.array(all_codes(from_bits), jnp.int8)
  expected = exact_table(from_bits, rounding)
  for row, to_bits in zip(expected, every_lower(from_bits), strict=True):
    low = quant.switch_codes(codes, from_bits, to_bits, rounding=rounding)
    assert low.dtype == jnp.int8
    np.testing.assert_array_equal(low, row)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16, jnp.int32])
def test_switch_codes_accepts_any_signed_integer_dtype_and_shape(dtype):
  codes = jnp.array(all_codes(8), dtype).reshape(4, 8, 8)
  low = jax.jit(lambda q: quant.switch_codes(q, 8, 3))(codes)
  assert low.shape == (4, 8, 8)
  np.testing.assert_array_equal(
    low.reshape(-1), [exact_switch(q, 8, 3, "half_even") for q in all_codes(8)]
  )


@pytest.mark.parametrize("to_bits, differing", [(6, 32), (4, 8), (2, 2)])
def test_tie_rules_differ_on_the_documented_number_of_codes(to_bits, differing):
  codes = jnp.array(all_codes(8), jnp.int8)
  even = quant.switch_codes(codes, 8, to_bits, rounding="half_even")
  up = quant.switch_codes(codes, 8, to_bits, rounding="half_up")
  assert int((even != up).sum()) == differing


def test_floor_keeps_the_top_bits_so_that_switching_composes():
  codes = jnp.array(all_codes(8), jnp.int8)
  once = quant.switch_codes(codes, 8, 3, rounding="floor")
  via_five = quant.switch_codes(
    quant.switch_codes(codes, 8, 5, rounding="floor"), 5, 3, rounding="floor"
  )
  np.testing.assert_array_equal(once, via_five)
  np.testing.assert_array_equal(once, np.array(all_codes(8)) >> 5)


@pytest.mark.parametrize(
  "kw, message",
  [
    ({"from_bits": 9, "to_bits": 4}, r"from_bits .*2\.\.8, got 9"),
    ({"from_bits": 8, "to_bits": 1}, r"to_bits .*2\.\.8, got 1"),
    ({"from_bits": 4, "to_bits": 6}, r"to_bits .*2\.\.4, got 6"),
    (
      {"from_bits": 8, "to_bits": 4, "rounding": "up"},
      "half_even.*half_up.*floor.*got 'up'",
    ),
  ],
)
def test_switch_codes_names_the_wrong_argument(kw, message):
  with pytest.raises(ValueError, match=message):
    quant.switch_codes(jnp.zeros((2,), jnp.int8), **kw)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("h", HIGHEST)
def test_every_code_decodes_and_fake_quantizes_to_exact_arithmetic(h, rounding):
  quantizer = quant.double_rounding(every_lower(h), rounding=rounding)
  codes = np.tile(np.array(all_codes(h), np.int8)[:, None], SCALES.size)
  # One float32 product: code * step is exact, as is scale * step.
  expected = exact_table(h, rounding).astype(np.float32) * steps_of(h)
  expected = expected[:, :, None] * SCALES
  indices = jnp.arange(len(quantizer.bits))
  encoded = {"codes": codes, "scale": SCALES}
  # The weights are decoded h-bit codes.
  params, w = {"scale": SCALES}, codes.astype(np.float32) * SCALES

  @jax.jit
  def run(encoded, params, w, indices):
    decoded = jax.vmap(quantizer.decode, (None, 0))(encoded, indices)
    fake_quantize = jax.vmap(quantizer.fake_quantize, (None, None, 0))
    faked = fake_quantize(params, w, indices)
    return decoded, faked, quantizer.encode(params, w)

  decoded, faked, encoded_again = run(encoded, params, w, indices)
  np.testing.assert_array_equal(decoded, expected)
  np.testing.assert_array_equal(faked, expected)
  np.testing.assert_array_equal(encoded_again["codes"], codes)


def boundary_weights(h: int, scale: float) -> np.ndarray:
  """Every tie of the first rounding, the clip ends, and both neighbors."""
  top = 1 << (h - 1)
  ties = np.arange(-2 * top - 3, 2 * top + 4, dtype=np.float32) / 2
  ties = (ties[ties != 0] * np.float32(scale)).astype(np.float32)
  below, above = np.nextafter(ties, -np.inf), np.nextafter(ties, np.inf)
  return np.concatenate([ties, below, above, [0.0]]).astype(np.float32)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("h", HIGHEST)
def test_weights_at_and_next_to_every_boundary_round_exactly(h, rounding):
  # A power of two: w / s is exact, so that exact arithmetic is the answer.
  scale = 2.0**-5
  w = boundary_weights(h, scale)
  quantizer = quant.double_rounding(every_lower(h), rounding=rounding)
  first = [
    exact_clip(round(Fraction(float(x)) / Fraction(scale)), h) for x in w
  ]
  expected = [
    [exact_switch(q, h, b, rounding) * scale * 2.0 ** (h - b) for q in first]
    for b in every_lower(h)
  ]
  params = {"scale": jnp.full((1, 1), scale)}
  faked = over_bits(quantizer.fake_quantize, quantizer)(params, w[:, None])
  np.testing.assert_array_equal(faked[..., 0], np.array(expected, np.float32))


def rounded(x: np.ndarray, rounding: str) -> np.ndarray:
  match rounding:
    case "half_even":
      return np.rint(x)
    case "half_up":
      return np.floor(x + 0.5)
  return np.floor(x)


def reference_gradients(w, scale, g, h, b, rounding, axes):
  """Float64, from the formulas: d w_hat / d w and d w_hat / d scale."""
  w, scale, g = (np.asarray(a, np.float64) for a in (w, scale, g))
  step = 2.0 ** (h - b)
  low, high = -(2.0 ** (b - 1)), 2.0 ** (b - 1) - 1
  v = w / (scale * step)
  first = np.clip(np.rint(w / scale), -(2.0 ** (h - 1)), 2.0 ** (h - 1) - 1)
  code = np.clip(rounded(first / step, rounding), low, high)
  # The second rounding clips nothing under floor: only the first one does.
  top = (2.0 ** (h - 1) - 1) / step if rounding == "floor" else high
  slope = np.where(v < low, low, np.where(v > top, high, code - v))
  shared = w.size / scale.size
  dscale = (g * slope).sum(axes, keepdims=True)
  dscale *= step / math.sqrt(shared * high)
  return np.where((v >= low) & (v <= top), g, 0), dscale


def gradients(quantizer):
  """Gradients of fake_quantize at every index, by jit and vmap."""

  def one(scale, w, g, index):
    _, pull = jax.vjp(
      lambda s, w: quantizer.fake_quantize({"scale": s}, w, index), scale, w
    )
    return pull(g)

  indices = jnp.arange(len(quantizer.bits))
  run = jax.jit(jax.vmap(one, (None, None, None, 0)))
  return lambda scale, w, g: run(scale, w, g, indices)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
  ("bits", "per_channel"),
  [
    *((bits, True) for bits in [(8, 6, 4, 2), (8, 7, 5, 3), (6, 4), (3, 2)]),
    ((8, 6, 4, 2), False),
  ],
)
def test_gradients_match_the_formulas_inside_on_and_beyond_the_ends(
  bits, rounding, per_channel
):
  h = bits[0]
  # Quarters of a code over 1.3 times the range: ties, both ends of every
  # bit-width and their neighbors; scales are powers of two, so v is exact.
  top = 2 ** (h - 1)
  v = np.arange(-1.3 * top, 1.3 * top, 0.25)
  ends = np.array([s * 2.0 ** (h - b) for b in bits for s in code_ends(b)])
  ends = np.concatenate([ends, [top - 1.0, -float(top)]]).astype(np.float32)
  v = np.concatenate(
    [v, ends, np.nextafter(ends, -np.inf), np.nextafter(ends, np.inf)]
  ).astype(np.float32)
  scale = np.array([[0.25, 2.0, 2.0**-9]], np.float32)
  if not per_channel:
    scale = scale[:, :1]
  w = v[:, None] * (scale if per_channel else scale * np.ones((1, 3), "f4"))
  g = np.random.default_rng(0).normal(size=w.shape).astype(np.float32)
  quantizer = quant.double_rounding(
    bits, rounding=rounding, per_channel=per_channel
  )
  dscales, dws = gradients(quantizer)(scale, w, g)
  axes = (0,) if per_channel else (0, 1)
  for i, b in enumerate(bits):
    dw, dscale = reference_gradients(w, scale, g, h, b, rounding, axes)
    np.testing.assert_array_equal(dws[i], dw.astype(np.float32))
    # A float32 sum of ~1000 terms of size 2^b: 1e-5 of their magnitude.
    terms = np.abs(g).sum() * 2.0 ** (h - 1) / math.sqrt(w.size)
    np.testing.assert_allclose(dscales[i], dscale, rtol=1e-5, atol=1e-6 * terms)


def code_ends(bits: int) -> tuple[float, float]:
  return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_gradients_match_the_formulas_on_random_kernels(rounding, per_channel):
  bits = (8, 5, 4, 2)
  rng = np.random.default_rng(1)
  w = rng.normal(size=(3, 3, 4, 6)).astype(np.float32)
  g = rng.normal(size=w.shape).astype(np.float32)
  quantizer = quant.double_rounding(
    bits, rounding=rounding, per_channel=per_channel
  )
  scale = np.asarray(quantizer.init(w)["scale"]) / 2  # so that some clip
  dscales, dws = gradients(quantizer)(scale, w, g)
  axes = (0, 1, 2) if per_channel else (0, 1, 2, 3)
  clipped = 0
  for i, b in enumerate(bits):
    dw, dscale = reference_gradients(w, scale, g, 8, b, rounding, axes)
    clipped += (dw == 0).sum()
    np.testing.assert_array_equal(dws[i], dw.astype(np.float32))
    np.testing.assert_allclose(dscales[i], dscale, rtol=1e-4, atol=1e-4)
  assert clipped > 20


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("h", [8, 5, 2])
def test_decoded_weights_are_inside_the_clip_range_for_every_scale(h, rounding):
  """code * scale / scale may miss the code by an ulp: the mask must not."""
  scale = np.exp(np.random.default_rng(0).uniform(-9, 2, (1, 500)))
  scale = scale.astype(np.float32)
  quantizer = quant.double_rounding(every_lower(h), rounding=rounding)
  for i, b in enumerate(quantizer.bits):
    codes = np.array(code_ends(b), np.float32)[:, None]
    w = codes * (scale * np.float32(2.0 ** (h - b)))
    _, pull = jax.vjp(
      lambda s, w, i=i: quantizer.fake_quantize({"scale": s}, w, i), scale, w
    )
    dscale, dw = pull(jnp.ones_like(w))
    np.testing.assert_array_equal(dw, np.ones_like(w))
    # The weight is its own quantized value: only an ulp of v remains.
    np.testing.assert_allclose(dscale, np.zeros_like(dscale), atol=1e-3)


def test_init_spans_three_standard_deviations():
  rng = np.random.default_rng(0)
  w = (rng.normal(size=(3, 3, 8, 5)) + rng.normal(size=5)).astype(np.float32)
  for per_channel, axes in ((True, (0, 1, 2)), (False, (0, 1, 2, 3))):
    mean = w.astype(np.float64).mean(axes, keepdims=True)
    std = w.astype(np.float64).std(axes, keepdims=True)
    bound = np.maximum(np.abs(mean - 3 * std), np.abs(mean + 3 * std))
    for bits in ((8, 4), (5, 3)):
      quantizer = quant.double_rounding(bits, per_channel=per_channel)
      scale = quantizer.init(w)["scale"]
      assert scale.dtype == jnp.float32
      np.testing.assert_allclose(scale, bound / 2 ** (bits[0] - 1), rtol=1e-5)


def test_only_the_highest_codes_and_the_scales_are_stored():
  quantizer = quant.double_rounding((6, 4, 2))
  w = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  encoded = quantizer.encode(quantizer.init(w), w)
  assert set(encoded) == {"codes", "scale"}
  assert encoded["codes"].dtype == jnp.int8
  assert encoded["codes"].shape == w.shape
  assert encoded["scale"].shape == (1, 3)
  assert quantizer.stored_bits == 6


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_each_unshared_scale_acts_like_a_shared_one_at_its_bit_width(
  rounding, per_channel
):
  bits = (8, 5, 4, 2)
  rng = np.random.default_rng(2)
  w = rng.normal(size=(3, 3, 4, 6)).astype(np.float32)
  g = rng.normal(size=w.shape).astype(np.float32)
  options = {"rounding": rounding, "per_channel": per_channel}
  shared = quant.double_rounding(bits, **options)
  unshared = quant.double_rounding(bits, shared=False, **options)
  params = unshared.init(w)
  first = shared.init(w)["scale"]
  assert params["scale"].shape == (4, *first.shape)
  np.testing.assert_array_equal(params["scale"], np.stack([first] * 4))
  # Scales that drifted apart, so that some weights clip.
  factors = np.array([0.5, 0.7, 0.6, 0.4], np.float32).reshape(4, 1, 1, 1, 1)
  scales = np.asarray(params["scale"]) * factors
  decode = over_bits(lambda encoded, _, i: unshared.decode(encoded, i), shared)
  decoded = decode(unshared.encode({"scale": scales}, w), w)
  outs = over_bits(unshared.fake_quantize, shared)({"scale": scales}, w)
  dscales, dws = gradients(unshared)(scales, w, g)
  for i in range(4):
    alone = {"scale": scales[i]}
    expected = shared.fake_quantize(alone, w, i)
    np.testing.assert_array_equal(outs[i], expected)
    np.testing.assert_array_equal(decoded[i], expected)
    dscale, dw = (d[i] for d in gradients(shared)(scales[i], w, g))
    np.testing.assert_array_equal(dws[i], dw)
    np.testing.assert_allclose(dscales[i, i], dscale, rtol=1e-5, atol=1e-5)
    assert (np.delete(dscales[i], i, axis=0) == 0).all()


def test_unshared_scales_store_float_weights():
  quantizer = quant.double_rounding((6, 4, 2), shared=False)
  w = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  encoded = quantizer.encode(quantizer.init(w), w)
  assert set(encoded) == {"weight", "scale"}
  np.testing.assert_array_equal(encoded["weight"], w)
  assert encoded["scale"].shape == (3, 1, 3)
  assert quantizer.stored_bits == 32


@pytest.mark.parametrize(
  "kw, message",
  [
    ({"bits": (8, 1)}, r"from 8 down to 2.*\(8, 1\)"),
    ({"bits": (2, 4)}, r"highest first.*\(2, 4\)"),
    ({"rounding": "even"}, "half_even.*half_up.*floor.*got 'even'"),
  ],
)
def test_double_rounding_names_the_wrong_option(kw, message):
  with pytest.raises(ValueError, match=message):
    quant.double_rounding(**kw)
