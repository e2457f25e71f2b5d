"""Optimizers with huge learning rates, to drive parameters out of range."""

import jax
import jax.numpy as jnp
import quick_compilation


def _sgd(learning_rate):
  def update(gradient, moments, step):
    del step
    return -learning_rate * gradient, moments

  return update


def _adam(learning_rate):
  def update(gradient, moments, step):
    mean = 0.9 * moments[0] + 0.1 * gradient
    square = 0.999 * moments[1] + 0.001 * gradient**2
    size = jnp.sqrt(square / (1 - 0.999**step)) + 1e-8
    return -learning_rate * mean / (1 - 0.9**step) / size, (mean, square)

  return update


OPTIMIZERS = {"sgd": _sgd, "adam": _adam}


def drift(loss, variables, optimizer, learning_rate, *, candidates, watch):
  """Trains for 400 steps, each at the next bit-width.

  Args:
    loss: `loss(variables, index) -> (scalar, output)`.
    variables: a pytree of float32 arrays.
    optimizer: a key of OPTIMIZERS.
    learning_rate: of every variable.
    candidates: number of bit-widths.
    watch: `watch(variables) -> scalar`.

  Returns:
    The variables after training, whether all gradients and outputs were finite
    at each step, and what was watched at each step.
  """
  update = OPTIMIZERS[optimizer](learning_rate)

  def step(carry, number):
    variables, moments = carry
    gradients, out = jax.grad(loss, has_aux=True)(
      variables, number % candidates
    )
    leaves = jax.tree.leaves((gradients, out))
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
    values, structure = jax.tree.flatten(variables)
    count = number.astype(jnp.float32) + 1
    updated = [
      update(gradient, moment, count)
      for gradient, moment in zip(
        jax.tree.leaves(gradients), moments, strict=True
      )
    ]
    values = [v + u for v, (u, _) in zip(values, updated, strict=True)]
    variables = jax.tree.unflatten(structure, values)
    return (variables, [m for _, m in updated]), (finite, watch(variables))

  zeros = [(jnp.zeros_like(v),) * 2 for v in jax.tree.leaves(variables)]
  run = quick_compilation.jit(
    lambda carry, numbers: jax.lax.scan(step, carry, numbers)
  )
  (variables, _), (finite, watched) = run(
    (variables, zeros), jnp.arange(400, dtype=jnp.int32)
  )
  return variables, finite, watched
