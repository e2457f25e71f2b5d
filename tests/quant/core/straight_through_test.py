"""The straight-through core: its values, and its gradients by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.quant.core import grid
from dr_jax.quant.core.straight_through import (
  round_straight_through,
  straight_through,
)


def gradients(x, scale, g, grids, index, **kw):
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
  found = gradients(
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
      out, dx, dscale = gradients(x, scale, x, grids, 0)
      assert (out.dtype, dx.dtype) == (x_dtype, x_dtype)
      assert (dscale.dtype, dscale.shape) == (scale_dtype, (1, 3))


def test_an_empty_batch_has_empty_and_zero_gradients():
  grids = grid.single_grids((4,), signed=True)
  x = jnp.ones((0, 3))
  out, dx, dscale = gradients(x, jnp.float32(1), x, grids, 0)
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
  _, _, dscale = gradients(x, scale, jnp.float32(1), grids, 0)
  np.testing.assert_allclose(
    dscale * math.sqrt(7), slope - 0.83 / 0.25, rtol=1e-5
  )


def test_straight_through_returns_the_second_and_passes_its_gradient():
  x, x_hat = jnp.array([0.1, 0.7]), jnp.array([0.0, 1.0])
  out, pull = jax.vjp(straight_through, x, x_hat)
  np.testing.assert_array_equal(out, x_hat)
  dx, dx_hat = pull(jnp.array([2.0, 3.0]))
  np.testing.assert_array_equal(dx, [2, 3])
  np.testing.assert_array_equal(dx_hat, [0, 0])
