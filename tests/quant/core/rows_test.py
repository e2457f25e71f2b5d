"""Reductions of eight rows at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dr_jax import quant
from dr_jax.quant.core.rows import fewer_rows
from dr_jax.runtime import compilation

SHAPE = (8, 16, 1024)
X = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int32)


@pytest.mark.parametrize("reduce", [jnp.sum, jnp.max])
def test_fewer_rows_reduce_to_the_same_integers(reduce):
  fewer = jax.jit(fewer_rows, static_argnums=(1, 2))(X, (0, 1), reduce)
  assert fewer.shape == (1, 16, 1024)
  for axes in ((0, 1), (0, 1, 2)):
    np.testing.assert_array_equal(reduce(fewer, axes), reduce(X, axes))


@pytest.mark.parametrize("shape", [(), (2**18,), (1, 2**18), (64, 64)])
def test_small_arrays_and_rows_that_eight_does_not_divide_stay(shape):
  x = jnp.ones(shape)
  assert fewer_rows(x, range(x.ndim)) is x


@pytest.mark.parametrize("axes", [(1,), (1, 2), (0, 2), ()])
def test_rows_that_do_not_all_share_a_result_stay(axes):
  assert fewer_rows(X, axes) is X


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")])
def test_an_array_that_is_explicitly_sharded_stays(spec):
  mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    x = jax.device_put(X, jax.NamedSharding(mesh, spec))
    assert jax.eval_shape(lambda x: fewer_rows(x, (0, 1)), x).shape == SHAPE


def test_learned_scales_get_their_gradients_without_an_array_of_terms():
  """By hand: with g = 1, d scale = (q - v inside, q outside) / sqrt(N Q_P)."""
  x = np.random.default_rng(0).normal(size=(1024, 128)).astype(np.float32)
  quantizer = quant.lsq((4,))

  def backward(params, x, g):
    fake = lambda params: quantizer.fake_quantize(params, x, 0)  # noqa: E731
    return jax.vjp(fake, params)[1](g)[0]["scale"]

  scale = np.full((1, 1, 128), 0.25, np.float32)
  arguments = {"scale": scale}, x, np.ones_like(x)
  program = compilation.jit(backward).lower(*arguments).compile()
  v = 4.0 * x.astype(np.float64)
  q = np.clip(np.rint(v), -8, 7)
  expected = np.where((v >= -8) & (v <= 7), q - v, q).sum(0)
  expected /= np.sqrt(1024 * 7)
  # Sums of 1024 terms below 8 in float32.
  np.testing.assert_allclose(
    program(*arguments)[0, 0], expected, rtol=1e-5, atol=1e-5
  )
  assert program.memory_analysis().temp_size_in_bytes < x.nbytes / 4
