"""Means that are the same in every program, and right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dr_jax.quant.core import exact_mean

SHAPES = [(7,), (5, 3), (3, 3, 4, 8), (2, 257, 33), (1, 1)]


def values(shape, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3)).astype("f4")


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_and_std_are_within_their_bounds(shape, per_channel):
  axes = exact_mean.channel_axes(len(shape), per_channel=per_channel)
  x = values(shape)
  wide = x.astype(np.float64)
  largest = np.abs(wide).max(axes, keepdims=True)
  mean, found = jax.jit(
    lambda x: (exact_mean.mean(x, axes), exact_mean.mean_and_std(x, axes))
  )(x)
  assert mean.dtype == jnp.float32
  error = np.abs(mean - wide.mean(axes, keepdims=True))
  # The unit, and rounding of the product to float32.
  assert (error <= largest * (2.0**-22 + 2.0**-23)).all()
  count = np.prod([shape[a] for a in axes], dtype=int)
  if count > 1:
    std = wide.std(axes, keepdims=True, ddof=1)
    np.testing.assert_array_equal(found[0], mean)
    np.testing.assert_allclose(found[1], std, rtol=1e-5)


def test_each_of_several_large_arrays_has_its_own_mean_and_std():
  x = np.stack([values((64, 1024)), 100 * values((64, 1024), seed=1)])
  found = exact_mean.mean_and_std(x, (1, 2))
  for number, one in enumerate(x):
    expected = exact_mean.mean_and_std(one, (0, 1))
    for each, wanted in zip(found, expected, strict=True):
      np.testing.assert_array_equal(each[number], wanted)


def test_the_mean_does_not_depend_on_order_program_or_sharding():
  x = values((64, 4, 128), seed=1)
  axes = (0, 1, 2)
  expected = np.asarray(exact_mean.mean_and_std(x, axes))
  rng = np.random.default_rng(0)
  mixed = rng.permutation(x.reshape(-1)).reshape(x.shape)
  both = jax.jit(lambda x: jnp.stack(exact_mean.mean_and_std(x, axes)))
  # Fused with what an optimizer or a rescaling might do around it.
  fused = jax.jit(
    lambda x, y: (
      x - exact_mean.mean_and_std(x, axes)[0] * y,
      *exact_mean.mean_and_std(x, axes),
    )
  )
  found = {
    "permuted": np.stack(exact_mean.mean_and_std(mixed, axes)),
    "jit": both(x),
    "constant": jax.jit(lambda: both(jnp.asarray(x)))(),
    "vmap": jax.vmap(both)(np.stack([x, mixed]))[1],
    "fused": np.stack(fused(x, jnp.float32(3))[1:]),
  }
  mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    for axis in (0, 1, 2):
      spec = P(*["x" if a == axis else None for a in range(3)])
      found[str(spec)] = both(jax.device_put(x, NamedSharding(mesh, spec)))
  for name, value in found.items():
    np.testing.assert_array_equal(value, expected, err_msg=name)
  # An ordinary float sum does: the test could fail.
  assert np.float32(x.sum()) != mixed.reshape(-1).cumsum()[-1]


def test_sums_are_exact_for_a_million_terms_on_each_side():
  """Every term is the largest integer: no limb may overflow."""
  for shape in ((2**20, 2), (1, 2**20), (2**10, 2**12)):
    x = np.full(shape, 2 - 2.0**-20, np.float32)
    found = exact_mean.mean(x, (0, 1))
    np.testing.assert_allclose(found, [[2 - 2.0**-20]], rtol=2.0**-22)
    found = exact_mean.mean(-x, (0, 1))
    np.testing.assert_allclose(found, [[2.0**-20 - 2]], rtol=2.0**-22)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 1e30, 3e38])
def test_zero_tiny_and_huge_values_stay_finite(value):
  x = np.full((4, 8), value, np.float32)
  mean, std = exact_mean.mean_and_std(x, (0, 1))
  assert np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()
  if 1e-30 <= value <= 1e30:
    np.testing.assert_allclose(mean, [[value]], rtol=1e-6)
  assert np.abs(mean) <= value
  assert (exact_mean.largest_magnitude(x, (0,)) > 0).all()
