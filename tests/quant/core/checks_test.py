"""Checks of arguments: what they accept, and what their messages name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.quant.core import checks


@pytest.mark.parametrize(
  "bits", [(8, 6, 4, 2), [7, 5, 3], (2,), np.array([8, 4])]
)
def test_check_bits_returns_a_tuple_of_python_ints(bits):
  checked = checks.check_bits(bits)
  assert checked == tuple(int(b) for b in bits)
  assert all(type(b) is int for b in checked)


@pytest.mark.parametrize(
  "bits",
  [(), (9,), (1,), (8, 8), (4, 8), (8.0,), (8, 4.5), 8, "84", (True,), (8, -2)],
)
def test_check_bits_names_the_value_and_the_constraint(bits):
  with pytest.raises(ValueError) as error:
    checks.check_bits(bits)
  assert repr(bits) in str(error.value)
  assert "integers from 8 down to 2, highest first" in str(error.value)


def test_check_bits_accepts_one_bit_only_where_a_method_asks_for_it():
  assert checks.check_bits((2, 1), lowest=1) == (2, 1)
  with pytest.raises(ValueError, match="from 4 down to 1"):
    checks.check_bits((5,), lowest=1, highest=4)


def test_check_rounding_names_the_three_rules():
  for rounding in checks.ROUNDINGS:
    checks.check_rounding(rounding)
  with pytest.raises(
    ValueError, match="one of 'half_even', 'half_up', 'floor', got"
  ):
    checks.check_rounding("nearest")


@pytest.mark.parametrize("index", [-1, 3, np.int32(7)])
def test_check_index_rejects_a_python_index_that_xla_would_clamp(index):
  with pytest.raises(
    ValueError, match=rf"index .*0\.\.2.*\(8, 4, 2\), got {index}"
  ):
    checks.check_index(index, (8, 4, 2))


def test_check_index_lets_traced_and_valid_indices_pass():
  checks.check_index(2, (8, 4, 2))
  jax.jit(lambda i: checks.check_index(i, (8, 4, 2)))(jnp.int32(5))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_check_finite_counts_the_bad_values(bad, kind):
  x = kind(np.array([[1.0, bad], [bad, 0.0]], np.float32))
  with pytest.raises(
    ValueError, match="kernel must be finite, but 2 of 4 values"
  ):
    checks.check_finite("kernel", x)


def test_check_finite_is_silent_for_finite_values_and_under_jit():
  checks.check_finite("w", jnp.array([0.0, 3e38, -1e-45]))
  jax.jit(lambda x: checks.check_finite("w", x))(jnp.array([jnp.nan]))


@pytest.mark.parametrize("value", [1, 8, np.int64(3)])
def test_check_integer_returns_a_python_int(value):
  checked = checks.check_integer("group", value, 1, 8)
  assert checked == value
  assert type(checked) is int


@pytest.mark.parametrize("value", [0, 9, 2.0, True, "2", None, (2,)])
def test_check_integer_names_the_argument_and_its_bounds(value):
  with pytest.raises(ValueError) as error:
    checks.check_integer("group", value, 1, 8)
  message = f"group must be an integer in 1..8, got {value!r}"
  assert str(error.value) == message
