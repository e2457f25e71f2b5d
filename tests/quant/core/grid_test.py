"""Integer grids, rounding rules and the straight-through core."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.quant.core import checks, grid
from dr_jax.quant.core.straight_through import round_straight_through

EXACT_ROUND = {
  "half_even": round,
  "half_up": lambda x: math.floor(x + Fraction(1, 2)),
  "floor": math.floor,
}


@pytest.mark.parametrize(
  "bits, signed, expected",
  [
    (2, True, (-2, 1)),
    (3, True, (-4, 3)),
    (4, True, (-8, 7)),
    (5, True, (-16, 15)),
    (6, True, (-32, 31)),
    (7, True, (-64, 63)),
    (8, True, (-128, 127)),
    (2, False, (0, 3)),
    (3, False, (0, 7)),
    (4, False, (0, 15)),
    (5, False, (0, 31)),
    (6, False, (0, 63)),
    (7, False, (0, 127)),
    (8, False, (0, 255)),
  ],
)
def test_code_range_is_twos_complement_or_counts_from_zero(
  bits, signed, expected
):
  assert grid.code_range(bits, signed=signed) == expected


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
def test_check_bits_names_what_it_rejects_and_what_is_allowed(bits):
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


@pytest.mark.parametrize("rounding", checks.ROUNDINGS)
def test_round_by_is_exact_on_ties_and_on_both_sides_of_them(rounding):
  ties = np.arange(-260, 261, dtype=np.float32) / 2
  # The neighbors of zero are denormal, and XLA may flush those to zero.
  beside = ties[ties != 0]
  x = np.concatenate(
    [ties, np.nextafter(beside, -np.inf), np.nextafter(beside, np.inf)]
  )
  # The sum x + 0.5 is itself rounded: half_up is for codes / 2^D only.
  if rounding == "half_up":
    x = np.arange(-128, 128, dtype=np.float32) / 64
  expected = [EXACT_ROUND[rounding](Fraction(float(v))) for v in x]
  np.testing.assert_array_equal(
    jax.jit(grid.round_by, static_argnums=0)(rounding, x), expected
  )


def test_select_gives_the_same_numbers_for_int_and_traced_index():
  for rounding in checks.ROUNDINGS:
    grids = grid.nested_grids((8, 7, 5, 2), rounding)
    for i in range(4):
      constants = grid.select(grids, i)
      traced = jax.jit(lambda j, g=grids: grid.select(g, j))(jnp.int32(i))
      assert all(type(number) is float for number in constants)
      np.testing.assert_array_equal(constants, traced)


def test_nested_grids_extend_the_gradient_to_the_first_range_under_floor():
  eight, two = grid.nested_grids((8, 2), "half_even")
  assert eight == (-128, 127, 1, -128, 127, -128, 127)
  assert two == (-2, 1, 64, -128, 127, -2, 1)
  eight, two = grid.nested_grids((8, 2), "floor")
  assert eight == (-128, 127, 1, -128, 127, -128, 127)
  assert two == (-2, 1, 64, -128, 127, -2, 127 / 64)
  eight, two = grid.nested_grids((8, 2), "floor", symmetric=True)
  assert eight == (-128, 127, 1, -127, 127, -127, 127)
  assert two == (-2, 1, 64, -127, 127, -127 / 64, 127 / 64)


def test_positive_clamps_any_scale_to_its_interval():
  raw = jnp.array([-jnp.inf, -1.0, 0.0, 1e-20, 0.5, 1e20, jnp.inf])
  np.testing.assert_array_equal(
    grid.positive(raw), [2**-30, 2**-30, 2**-30, 2**-30, 0.5, 2**30, 2**30]
  )


def _core_gradients(x, scale, g, grids, index, **kw):
  out, pull = jax.vjp(
    lambda x, s: round_straight_through(x, s, grids, index, **kw), x, scale
  )
  return out, *pull(g)


# By hand for 3-bit codes -4..3 and scale 1/2: v = 2x, N = 1, sqrt(Q_P) =
# sqrt(3); d scale = (code - v) / sqrt(3) inside, bound / sqrt(3) outside.
HAND = [
  # x, out, dx, d scale * sqrt(3)
  (0.3, 0.5, 1, 1 - 0.6),
  (0.25, 0.0, 1, 0 - 0.5),  # tie to even, below
  (0.75, 1.0, 1, 2 - 1.5),  # tie to even, above
  (-0.25, 0.0, 1, 0.5),
  (1.5, 1.5, 1, 0.0),  # v = Q_P: inside
  (np.nextafter(np.float32(1.5), np.float32(2)), 1.5, 0, 3.0),
  (1.6, 1.5, 0, 3.0),  # rounds to Q_P, yet v > Q_P: outside
  (-2.0, -2.0, 1, 0.0),  # v = Q_N: inside
  (np.nextafter(np.float32(-2), np.float32(-3)), -2.0, 0, -4.0),
  (1e30, 1.5, 0, 3.0),
  (-1e30, -2.0, 0, -4.0),
]


@pytest.mark.parametrize("x, out, dx, dscale", HAND)
@pytest.mark.parametrize("traced", [False, True])
def test_straight_through_matches_the_gradients_found_by_hand(
  x, out, dx, dscale, traced
):
  grids = grid.single_grids((3,), signed=True)
  index = jnp.int32(0) if traced else 0
  found = _core_gradients(
    jnp.float32(x), jnp.float32(0.5), jnp.float32(2.0), grids, index
  )
  # The last bits of 2x - code: 1e-6 absolute.
  np.testing.assert_allclose(
    found, [out, 2 * dx, 2 * dscale / math.sqrt(3)], rtol=1e-6, atol=1e-6
  )


def test_gradients_have_the_dtypes_of_their_inputs():
  grids = grid.single_grids((4,), signed=True)
  for x_dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    for scale_dtype in (jnp.float32, jnp.bfloat16):
      x = jnp.ones((2, 3), x_dtype)
      scale = jnp.ones((1, 3), scale_dtype)
      out, dx, dscale = _core_gradients(x, scale, x, grids, 0)
      assert (out.dtype, dx.dtype) == (x_dtype, x_dtype)
      assert (dscale.dtype, dscale.shape) == (scale_dtype, (1, 3))


def test_an_empty_batch_has_empty_and_zero_gradients():
  grids = grid.single_grids((4,), signed=True)
  x = jnp.ones((0, 3))
  out, dx, dscale = _core_gradients(x, jnp.float32(1), x, grids, 0)
  assert out.shape == dx.shape == (0, 3)
  assert dscale == 0


def test_gradients_match_central_differences_away_from_the_levels():
  """Between two levels the output is linear in the scale with slope `code`.

  The straight-through estimate replaces that slope by code - v, the slope of
  code(v) - v: so it must equal the true slope less v, times 1/sqrt(N Q_P).
  """
  grids = grid.single_grids((4,), signed=True)
  x, scale, step = jnp.float32(0.83), jnp.float32(0.25), 2.0**-10
  out = [round_straight_through(x, scale + d, grids, 0) for d in (step, -step)]
  slope = (out[0] - out[1]) / (2 * step)
  _, _, dscale = _core_gradients(x, scale, jnp.float32(1), grids, 0)
  np.testing.assert_allclose(
    dscale * math.sqrt(7), slope - 0.83 / 0.25, rtol=1e-5
  )
