"""The squeezing of weights against float64 formulas and hand-made numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.quant.core.tanh_normalize import normalized

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def pulled(w, g):
  @jax.jit
  def run(w, g):
    r, pull = jax.vjp(normalized, w)
    return r, *pull(g)

  return run(w, g)


def formula(w, g):
  """Value and gradient in float64, for a single largest weight."""
  w, g = np.asarray(w, np.float64), np.asarray(g, np.float64)
  t = np.tanh(w)
  largest = np.abs(t).max()
  dt = g / largest
  at = np.unravel_index(np.abs(t).argmax(), t.shape)
  dt[at] -= np.sign(t[at]) * (g * t).sum() / largest**2
  return t / largest, (1 - t**2) * dt


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 0.3, 2.0])
@pytest.mark.parametrize("shape", [(9,), (16, 32), (3, 3, 5, 4)])
def test_values_and_gradients_match_the_formula(shape, scale):
  rng = np.random.default_rng(len(shape))
  w = (rng.normal(size=shape) * scale).astype(np.float32)
  g = rng.normal(size=shape).astype(np.float32)
  r, dw = pulled(w, g)
  expected, gradient = formula(w, g)
  close(r, expected)
  # Gradients are in units of 1 / w; float32 t says little about 1 - t^2 where
  # it is almost 1.
  close(dw * scale, gradient * scale, atol=1e-5)
  assert np.abs(r).max() == pytest.approx(1, abs=1e-6)
  assert r.dtype == jnp.float32


def test_gradient_equals_that_of_the_plain_formula():
  w = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
  g = np.random.default_rng(1).normal(size=(7, 6)).astype(np.float32)

  def careless(w):
    t = jnp.tanh(w)
    return t / jnp.abs(t).max()

  close(pulled(w, g)[1], jax.vjp(careless, w)[1](g)[0])


def test_weights_that_share_the_maximum_share_its_gradient_equally():
  t = np.array([0.5, -0.5, 0.25, 0.5], np.float32)
  w = np.arctanh(t)
  w[1] = -w[0]
  g = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
  # sum(g t) / M^2 = (0.5 - 1 + 0.75 + 2) / 0.25 = 9, a third to each.
  dt = g / 0.5 - np.array([3, -3, 0, 3])
  r, dw = pulled(w, g)
  np.testing.assert_allclose(r, [1, -1, 0.5, 1], rtol=1e-6)
  np.testing.assert_allclose(dw, (1 - t**2) * dt, rtol=1e-5)


def test_a_tensor_of_zeros_has_the_gradient_of_tanh():
  g = np.array([[1.0, -2.0], [3.0, 0.5]], np.float32)
  r, dw = pulled(np.zeros((2, 2), np.float32), g)
  np.testing.assert_array_equal(r, np.zeros((2, 2)))
  np.testing.assert_array_equal(dw, g)


@pytest.mark.parametrize("size", [1.0, 3e38, np.inf])
def test_saturated_weights_have_zero_gradients_for_any_cotangent(size):
  # So many that the sum of what is above them may overflow.
  w = np.repeat(np.array([[50.0], [-3e38], [1.0]], np.float32), 2048, 1)
  r, dw = pulled(w, np.full(w.shape, size, np.float32))
  np.testing.assert_allclose(r[:, 0], [1, -1, np.tanh(1)], rtol=1e-6)
  np.testing.assert_array_equal(dw[:2], np.zeros((2, 2048)))
  assert np.isfinite(dw[2]).all() and (dw[2] > 0).all()


def test_no_value_leaves_the_unit_interval():
  for seed in range(50):
    w = np.random.default_rng(seed).normal(size=(64,)).astype(np.float32)
    assert np.abs(normalized(w)).max() <= 1


def test_a_constant_weight_gives_the_same_bits_as_a_traced_one():
  w = np.random.default_rng(0).normal(size=(64, 999)).astype(np.float32)
  expected = normalized(w)
  np.testing.assert_array_equal(jax.jit(normalized)(w), expected)
  np.testing.assert_array_equal(jax.jit(lambda: normalized(w))(), expected)


def test_low_precision_weights_get_gradients_of_their_own_dtype():
  w = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
  w = jnp.asarray(w, jnp.bfloat16)
  r, dw = pulled(w, np.ones((7, 6), np.float32))
  assert r.dtype == jnp.float32
  assert dw.dtype == jnp.bfloat16
  close(r, formula(w.astype(jnp.float32), r)[0])


def test_the_clamped_float_branch_matches_the_reference(golden):
  arrays = golden("adabits.npz")
  w = arrays["w.conv.in"].transpose(2, 3, 1, 0)
  g = arrays["w.conv.gout"].transpose(2, 3, 1, 0)
  r, dw = pulled(w, g)
  close(r, arrays["w.conv.clamp.b32.out"].transpose(2, 3, 1, 0))
  close(dw, arrays["w.conv.clamp.b32.gin"].transpose(2, 3, 1, 0))


@pytest.mark.parametrize("name", ["conv", "lin"])
def test_the_float_branch_of_any_precision_matches_the_reference(golden, name):
  """Its weights are r times the mean magnitude."""
  arrays = golden("any_precision.npz")
  w, g, size = (arrays[f"w.{name}.{key}"] for key in ("in", "gout", "E"))
  r, dw = pulled(w, g)
  close(r * size, arrays[f"w.{name}.b32.out"])
  close(dw * size, arrays[f"w.{name}.b32.gin"])
