"""Inputs with a scale for each row: every code, gradients, rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant

BITS = (8, 7, 6, 5, 4, 3, 2)


def ends(bits, signed):
  if signed:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  return 0, 2**bits - 1


@pytest.mark.parametrize("signed", [False, True])
def test_each_row_has_the_scale_at_which_its_largest_value_is_the_last_code(
  signed,
):
  quantizer = quant.dynamic_activation(BITS, signed=signed)
  run = jax.jit(lambda x, index: quantizer.fake_quantize({}, x, index))
  integers = jax.jit(lambda x, index: quantizer.integers({}, x, index))
  for index, bits in enumerate(BITS):
    low, high = ends(bits, signed)
    # The lowest code is one further from zero, and no value reaches it.
    codes = np.arange(low + signed, high + 1)
    near = np.concatenate([codes, codes[1:] - 0.49, codes[:-1] + 0.49])
    expected = np.concatenate([codes, codes[1:], codes[:-1]])
    scales = np.array([[1e-3], [0.5], [3e4]], np.float32)
    x = (near * scales).astype(np.float32)
    found = integers(x, jnp.int32(index))
    np.testing.assert_array_equal(found.codes, np.tile(expected, (3, 1)))
    np.testing.assert_allclose(found.scale, scales, rtol=1e-6)
    codes = found.codes.astype(np.float32)
    np.testing.assert_array_equal(run(x, jnp.int32(index)), codes * found.scale)


def test_signed_inputs_pass_every_gradient_and_unsigned_ones_above_zero():
  x = np.array([[3.0, -2.0, 0.0, 0.1], [-1.0, -5.0, 7.0, 1e-9]], np.float32)
  g = np.arange(1, 9, dtype=np.float32).reshape(2, 4)

  def gradient(signed, index):
    quantizer = quant.dynamic_activation((8, 2), signed=signed)
    _, pull = jax.vjp(lambda x: quantizer.fake_quantize({}, x, index), x)
    return pull(g)[0]

  for index in (0, 1):
    np.testing.assert_array_equal(gradient(True, index), g)
    np.testing.assert_array_equal(
      gradient(False, index), np.where(x >= 0, g, 0)
    )


def test_rows_do_not_know_of_each_other():
  x = jax.random.normal(jax.random.key(0), (3, 4, 16))
  x *= jnp.geomspace(1e-6, 1e6, 12).reshape(3, 4, 1)
  quantizer = quant.dynamic_activation((4,), signed=True)
  together = quantizer.fake_quantize({}, x, 0)
  for row in np.ndindex(3, 4):
    alone = quantizer.fake_quantize({}, x[row], 0)
    np.testing.assert_array_equal(together[row], alone)
  error = jnp.linalg.norm(together - x, axis=-1) / jnp.linalg.norm(x, axis=-1)
  assert jnp.max(error) < 0.15  # half a step of 1/7 of the largest, or less


def test_rows_of_zeros_single_values_and_half_precision_keep_shape_and_dtype():
  quantizer = quant.dynamic_activation((8, 2), signed=True)
  for x in (jnp.zeros((2, 3)), jnp.float32(-2.0), jnp.ones((2, 0))):
    found = quantizer.fake_quantize({}, x, 0)
    np.testing.assert_array_equal(found, x)
    assert found.shape == x.shape
  half = jnp.linspace(-2, 2, 9).astype(jnp.bfloat16)
  found = quantizer.fake_quantize({}, half, 1)
  assert found.dtype == jnp.bfloat16
  assert set(found.astype(np.float32).tolist()) == {-2.0, 0.0, 2.0}


def test_bits_and_signs_that_do_not_exist_are_one_line():
  with pytest.raises(ValueError, match=r"bits .*from 8 down to 2.*\(9, 4\)"):
    quant.dynamic_activation((9, 4))
  with pytest.raises(ValueError, match="signed must be .* got None"):
    quant.dynamic_activation((8, 4)).fake_quantize({}, jnp.ones(3), 0)
