"""Counts of products, by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from dr_jax.benchmarks.products import Product, products

RNGS = nnx.Rngs(0)
LINEAR = nnx.Linear(4, 6, rngs=RNGS)
CONV = nnx.Conv(4, 6, (3, 3), feature_group_count=2, strides=2, rngs=RNGS)
TRANSPOSED = nnx.ConvTranspose(4, 5, (3, 3), strides=2, rngs=RNGS)
SQUARE = jnp.ones((4, 4))
X, IMAGES = jnp.ones((3, 4)), jnp.ones((2, 6, 6, 4))


def carried(x):
  def body(carry, _):
    y = carry @ SQUARE
    return y + x, y @ y.T

  return lax.scan(body, jnp.ones((3, 4)), length=5)[1]


def in_integers(x):
  w = jnp.ones((4, 6), jnp.int8)
  return jnp.dot(x.astype(jnp.int8), w, preferred_element_type=jnp.int32)


@pytest.mark.parametrize(
  ("f", "x", "expected"),
  [
    (LINEAR, X, [(3 * 24, True, False)]),
    (jax.jit(LINEAR), X, [(3 * 24, True, False)]),
    (jax.checkpoint(LINEAR), X, [(3 * 24, True, False)]),
    (lambda x: x @ x.T, X, [(3 * 3 * 4, False, False)]),
    (lambda x: SQUARE @ SQUARE, X, [(64, True, False)]),
    (in_integers, X, [(3 * 24, True, True)]),
    (CONV, IMAGES, [(2 * 9 * 6 * 9 * 2, True, False)]),
    (TRANSPOSED, IMAGES, [(2 * 36 * 4 * 9 * 5, True, False)]),
    (
      carried,
      X,
      [(5 * 3 * 16, True, False), (5 * 3 * 3 * 4, False, False)],
    ),
  ],
)
def test_products_are_counted_as_by_hand(f, x, expected):
  assert products(f, x) == [Product(*each) for each in expected]
