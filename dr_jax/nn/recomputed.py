"""Layers that quantize their input again for the gradient of their kernel.

That gradient needs the quantized input, which autodiff keeps from the forward
pass: as many floats as the input itself has, which the gradient through the
rounding needs anyway. With the input alone kept, a step takes less memory than
that of the float network. Both quantizations give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax.runtime.order import after


def recomputed(
  call: Callable[[Any, jax.Array], jax.Array], layer: Any, x: jax.Array
) -> jax.Array:
  """Returns call(layer, x), keeping x and the layer alone for its gradient.

  Args:
    call: reads variables of the layer and writes none.
    layer: a quantized layer.
    x: inputs [n, ...], floats.
  """
  graph, of_input, rest = nnx.split(
    layer, nnx.PathContains("input_params"), ...
  )
  leaves, tree = jax.tree.flatten(rest)
  floats, integers = {}, {}
  for number, leaf in enumerate(leaves):
    # A Python int, as a bit-width may be, has to stay a constant.
    if isinstance(leaf, jax.Array):
      inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
      (floats if inexact else integers)[number] = leaf

  def function(x, of_input, floats, integers):
    arrays = floats | integers
    filled = [arrays.get(number, leaf) for number, leaf in enumerate(leaves)]
    return call(nnx.merge(graph, of_input, tree.unflatten(filled)), x)

  return _recomputed(function, x, of_input, floats, integers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(function, x, of_input, floats, integers):
  return function(x, of_input, floats, integers)


def _forward(function, *operands):
  return function(*operands), operands


def _backward(function, operands, g):
  x, of_input, floats, integers = operands
  _, transposed = jax.vjp(
    lambda x, of_input: function(x, of_input, floats, integers), x, of_input
  )
  dx, dof_input = transposed(g)
  # Else XLA quantizes during the forward pass, and keeps the result.
  x = after(x, dx)
  _, transposed = jax.vjp(
    lambda floats: function(x, of_input, floats, integers), floats
  )
  return dx, dof_input, *transposed(g), None


_recomputed.defvjp(_forward, _backward)
