"""Binary and ternary weights against tables by hand and float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant

W = np.array([[1.0, -4.0], [-0.5, 0.0], [2.5, -0.0], [0.0, 4.0]], np.float32)
# Means of |w|: 1 and 2 per channel, 1.5 per tensor.


def over(w, per_channel):
  return tuple(range(w.ndim - 1 if per_channel else w.ndim))


def test_binary_by_hand():
  encoded = quant.binary().encode({}, W)
  np.testing.assert_array_equal(
    encoded["codes"], [[1, 0], [0, 1], [1, 1], [1, 1]]
  )
  np.testing.assert_array_equal(
    quant.binary().fake_quantize({}, W, 0), [[1, -2], [-1, 2], [1, 2], [1, 2]]
  )
  np.testing.assert_array_equal(
    quant.binary(per_channel=False).fake_quantize({}, W, 0),
    [[1.5, -1.5], [-1.5, 1.5], [1.5, 1.5], [1.5, 1.5]],
  )


def test_ternary_by_hand():
  # Thresholds 0.7 and 1.4 per channel, 1.05 per tensor.
  encoded = quant.ternary().encode({}, W)
  np.testing.assert_array_equal(
    encoded["codes"], [[1, -1], [0, 0], [1, 0], [0, 1]]
  )
  np.testing.assert_array_equal(
    quant.ternary().fake_quantize({}, W, 0),
    [[1.75, -4], [0, 0], [1.75, 0], [0, 4]],
  )
  np.testing.assert_array_equal(
    quant.ternary(per_channel=False).fake_quantize({}, W, 0),
    [[0, -3.5], [0, 0], [3.5, 0], [0, 3.5]],
  )


def reference(name, w, per_channel):
  w = w.astype(np.float64)
  size, axes = np.abs(w), over(w, per_channel)
  mean = size.mean(axes, keepdims=True)
  if name == "binary":
    return np.where(w >= 0, mean, -mean)
  above = size > 0.7 * mean
  scale = (size * above).sum(axes, keepdims=True) / above.sum(
    axes, keepdims=True
  )
  return np.sign(w) * above * scale


@pytest.mark.parametrize("name", ["binary", "ternary"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", [(3, 3, 16, 8), (3, 3, 1, 12), (40, 5)])
def test_random_weights_match_the_formulas(name, per_channel, shape):
  w = np.random.default_rng(0).normal(size=shape).astype(np.float32) / 8
  quantizer = quant.get(name, per_channel=per_channel)
  assert quantizer.init(w) == {}
  out, encoded = jax.jit(
    lambda w, i: (quantizer.fake_quantize({}, w, i), quantizer.encode({}, w))
  )(w, jnp.int32(0))
  expected = reference(name, w, per_channel)
  # The mean is computed in units of 2^-22 of the largest weight.
  np.testing.assert_allclose(out, expected, rtol=2e-6)
  scale = encoded["scale"]
  assert scale.shape == np.mean(w, over(w, per_channel), keepdims=True).shape


def test_ternary_keeps_the_value_of_a_single_large_weight():
  w = np.full((4096, 1), 1e-3, np.float32)
  w[7] = -3.3
  # The threshold is 0.7 (0.001 * 4095 + 3.3) / 4096 = 0.00126.
  encoded = quant.ternary().encode({}, w)
  assert np.flatnonzero(encoded["codes"]).tolist() == [7]
  np.testing.assert_allclose(encoded["scale"], [[3.3]], rtol=1e-6)


def test_ternary_scale_of_huge_weights_never_exceeds_the_largest():
  w = np.array([[3e38], [-3e38], [3e38], [1e38]], np.float32)
  expected = np.array([[3e38], [-3e38], [3e38], [0]], np.float32)
  out = quant.ternary().fake_quantize({}, w, 0)
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", ["binary", "ternary"])
def test_zero_weights_stay_zero(name):
  w = np.zeros((8, 3), np.float32)
  quantizer = quant.get(name)
  np.testing.assert_array_equal(quantizer.fake_quantize({}, w, 0), w)
  np.testing.assert_array_equal(quantizer.encode({}, w)["scale"], [[0] * 3])


@pytest.mark.parametrize("name", ["binary", "ternary"])
def test_gradient_passes_straight_through_everywhere(name):
  g = np.arange(8, dtype=np.float32).reshape(4, 2) - 3
  quantizer = quant.get(name)
  _, pull = jax.vjp(lambda w: quantizer.fake_quantize({}, w, 0), W)
  np.testing.assert_array_equal(pull(g)[0], g)


def test_binary_stores_one_bit_per_weight_and_ternary_two():
  packed = quant.binary().storage.pack(quant.binary().encode({}, W))
  # Row by row: 1 0, 0 1, 1 1, 1 1, the first bit lowest.
  np.testing.assert_array_equal(packed["codes"], [0b11111001])
  packed = quant.ternary().storage.pack(quant.ternary().encode({}, W))
  # 1 -1 0 0 and 1 0 0 1: -1 is 0b11.
  np.testing.assert_array_equal(packed["codes"], [0b00001101, 0b01000001])
  for quantizer, codes in ((quant.binary(), 1), (quant.ternary(), 2)):
    encoded = quantizer.encode({}, W)
    assert quantizer.storage.size(encoded, 0) == codes + 8
    assert quantizer.stored_bits == codes


@pytest.mark.parametrize("bits", [(2,), (8, 1), (0,), ()])
def test_other_bits_than_one_are_an_error_that_names_binary(bits):
  with pytest.raises(ValueError, match=r"bits of binary must be \(1,\), got"):
    quant.binary(bits)


@pytest.mark.parametrize("bits", [(1,), (8, 2), (3,), ()])
def test_other_bits_than_two_are_an_error_that_names_ternary(bits):
  with pytest.raises(ValueError, match=r"bits of ternary must be \(2,\), got"):
    quant.ternary(bits)
