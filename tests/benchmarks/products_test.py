"""Counts of products, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from dr_jax.benchmarks.products import Product, products


def linear():
  return nnx.Linear(4, 6, rngs=nnx.Rngs(0))


def conv():
  options = {"feature_group_count": 2, "strides": 2}
  return nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **options)


def transposed():
  return nnx.ConvTranspose(4, 5, (3, 3), strides=2, rngs=nnx.Rngs(0))


SQUARE = np.ones((4, 4), np.float32)
X, IMAGES = np.ones((3, 4), np.float32), np.ones((2, 6, 6, 4), np.float32)


def carried(x):
  def body(carry, _):
    y = carry @ SQUARE
    return y + x, y @ y.T

  return lax.scan(body, jnp.ones((3, 4)), length=5)[1]


def in_integers(x):
  w = jnp.ones((4, 6), jnp.int8)
  return jnp.dot(x.astype(jnp.int8), w, preferred_element_type=jnp.int32)


@pytest.mark.parametrize(
  ("make", "x", "expected"),
  [
    (linear, X, [(3 * 24, True, False)]),
    (lambda: jax.jit(linear()), X, [(3 * 24, True, False)]),
    (lambda: jax.checkpoint(linear()), X, [(3 * 24, True, False)]),
    (lambda: lambda x: x @ x.T, X, [(3 * 3 * 4, False, False)]),
    (lambda: lambda x: SQUARE @ jnp.asarray(SQUARE), X, [(64, True, False)]),
    (lambda: in_integers, X, [(3 * 24, True, True)]),
    (conv, IMAGES, [(2 * 9 * 6 * 9 * 2, True, False)]),
    (transposed, IMAGES, [(2 * 36 * 4 * 9 * 5, True, False)]),
    (
      lambda: carried,
      X,
      [(5 * 3 * 16, True, False), (5 * 3 * 3 * 4, False, False)],
    ),
  ],
)
def test_products_are_counted_as_by_hand(make, x, expected):
  assert products(make(), x) == [Product(*each) for each in expected]
