"""Tests of the learning rate of the scales."""

import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.train import alrs


@pytest.mark.parametrize(
  ("bits", "expected"),
  [
    ((8, 6, 4, 2), (1, 0.1, 0.01, 0.001)),
    ((4, 3, 2), (1, 0.5, 0.1)),
    ((8, 7, 5, 3), (1, 0.5, 0.05, 0.005)),
    ((5,), (1,)),
  ],
)
def test_eta_falls_tenfold_every_two_bits(bits, expected):
  np.testing.assert_allclose(alrs.eta(bits), expected, rtol=1e-12)


def test_gradient_size_is_the_mean_of_clipped_largest_entries():
  gradients = [jnp.array([0.25, -0.5]), jnp.array([[3.0, 0.0]]), jnp.zeros(2)]
  expected = (0.5 + 1 + 0) / 3
  np.testing.assert_allclose(alrs.gradient_size(gradients), expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("mode", "size", "expected"),
  [
    ("relative", 0.25, 0.1 * 0.75),
    ("eta", 0.25, 0.1),
    ("none", 0.25, 1.0),
    ("proportional", 0.25, 1.0),
    ("paper", 0.25, 0.0),  # 5e-4 - 0.25 < 0: the guard
    ("paper", 1e-4, 0.1 * 4e-4 / 5e-4),
  ],
)
def test_factor_follows_the_formula_of_its_mode(mode, size, expected):
  factor = alrs.factor(mode, 0.1, jnp.float32(size), jnp.float32(5e-4))
  np.testing.assert_allclose(factor, expected, rtol=1e-5, atol=1e-8)


def test_only_a_proportional_update_counts_in_scales():
  scale = jnp.array([0.5, 0.001])
  assert alrs.unit("proportional", scale) is scale
  assert {alrs.unit(m, scale) for m in alrs.MODES if m != "proportional"} == {1}


def test_an_unknown_mode_is_an_error_that_lists_the_known():
  with pytest.raises(ValueError, match="alrs must be one of.*got 'fast'"):
    alrs.factor("fast", 1.0, jnp.float32(0), jnp.float32(1))
