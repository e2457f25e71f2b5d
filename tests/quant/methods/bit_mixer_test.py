"""Bit-Mixer against integer arithmetic and formulas derived by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant

SCALE = np.float32(2.0**-5)
EVERY = (8, 7, 6, 5, 4, 3, 2)


def test_every_code_is_an_arithmetic_shift_without_the_lowest_state():
  quantizer = quant.bit_mixer(EVERY)
  params = {"scale": jnp.full((1,), SCALE)}
  # Two codes beyond both ends: they clip to the ends.
  wanted = np.arange(-130, 131)
  w = wanted.astype(np.float32) * SCALE
  first = np.clip(wanted, -127, 127)
  np.testing.assert_array_equal(quantizer.encode(params, w)["codes"], first)
  for index, bits in enumerate(EVERY):
    shifted = first >> (8 - bits)
    expected = shifted.astype(np.float32) * SCALE * 2.0 ** (8 - bits)
    got = quantizer.fake_quantize(params, w, index)
    np.testing.assert_array_equal(got, expected)


def test_few_codes_by_hand():
  quantizer = quant.bit_mixer((4, 2))
  params = {"scale": jnp.ones((1,))}
  w = np.array([-9.0, -7.4, -4.0, -0.6, 0.5, 3.0, 4.0, 7.6], np.float32)
  four = [-7, -7, -4, -1, 0, 3, 4, 7]
  two = [-8, -8, -4, -4, 0, 0, 4, 4]  # floor to multiples of 4
  np.testing.assert_array_equal(quantizer.fake_quantize(params, w, 0), four)
  np.testing.assert_array_equal(quantizer.fake_quantize(params, w, 1), two)


@pytest.mark.parametrize("index", range(3))
def test_gradients_follow_the_formulas(index):
  bits = (8, 4, 2)
  quantizer = quant.bit_mixer(bits)
  step = 2.0 ** (8 - bits[index])
  ends = np.array([-128.0, -127.0, 127.0, 128.0])
  v = np.concatenate([np.arange(-140, 140, 0.75), ends])
  w = (v * SCALE).astype(np.float32)
  g = np.random.default_rng(0).normal(size=w.shape).astype(np.float32)
  _, pull = jax.vjp(
    lambda s, w: quantizer.fake_quantize({"scale": s}, w, index),
    jnp.full((1,), SCALE),
    w,
  )
  dscale, dw = pull(g)
  inside = np.abs(v) <= 127
  np.testing.assert_array_equal(dw, np.where(inside, g, 0))
  code = np.floor(np.clip(np.rint(v), -127, 127) / step)
  slope = np.where(inside, code - v / step, code)
  high = 2 ** (bits[index] - 1) - 1
  expected = (g * slope).sum() * step / math.sqrt(v.size * high)
  np.testing.assert_allclose(dscale[0], expected, rtol=1e-4)


def test_the_scale_starts_as_in_lsq():
  w = np.array([[1.0, -3.0], [2.0, 2.0]], np.float32)
  params = quant.bit_mixer((8, 2), per_channel=False).init(w)
  np.testing.assert_allclose(params["scale"], [[4 / math.sqrt(127)]], rtol=1e-6)
  params = quant.bit_mixer((8, 2)).init(w)
  expected = np.array([[3.0, 5.0]]) / math.sqrt(127)
  np.testing.assert_allclose(params["scale"], expected, rtol=1e-6)
