"""Integer grids and rounding rules."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.quant.core import checks, grid

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


@pytest.mark.parametrize("rounding", checks.ROUNDINGS)
def test_round_by_is_exact_on_ties_and_on_both_sides_of_them(rounding):
  ties = np.arange(-260, 261, dtype=np.float32) / 2
  # The neighbors of zero are denormal, and XLA may flush those to zero.
  neighbors = ties[ties != 0]
  x = np.concatenate(
    [ties, np.nextafter(neighbors, -np.inf), np.nextafter(neighbors, np.inf)]
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
