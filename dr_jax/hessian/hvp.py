"""Hessian-vector products, without the Hessian.

  H v = d/dt grad(params + t v) at t = 0     forward over reverse
  H v = d/dparams <grad(params), v>          reverse over reverse

Both are exact and cost a few gradients (Pearlmutter, "Fast Exact
Multiplication by the Hessian", Neural Computation 6, 1994). On a CPU forward
over reverse takes about 2.1 gradients, reverse over reverse nearly 10:
`python -m dr_jax.benchmarks.hessian`.

Through a `jax.custom_vjp` the product is the derivative of its backward rule,
which for straight-through rounding means little: take the float network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dr_jax.runtime.tree import named_leaves

if TYPE_CHECKING:
  from jaxtyping import Array, Float, PyTree

MODES = ("forward_over_reverse", "reverse_over_reverse")


def hvp(
  loss: Callable[..., Float[Array, ""]],
  params: PyTree,
  v: PyTree,
  *args: Any,
  mode: str = "forward_over_reverse",
) -> PyTree:
  """Multiplies the Hessian of a loss by a vector.

  Args:
    loss: loss(params, *args) -> scalar.
    params: pytree of floating arrays, where the Hessian is taken.
    v: the vector; structure, shapes and dtypes of params.
    *args: passed on to the loss, not differentiated.
    mode: "forward_over_reverse", or "reverse_over_reverse" for a loss that
      JAX cannot take through `jax.jvp` of `jax.grad`.

  Returns:
    H v, like params.

  Raises:
    ValueError: for an unknown mode, or a v that does not fit params.

  >>> loss = lambda w: w[0] ** 2 * w[1]
  >>> hvp(loss, jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0])).tolist()
  [6.0, 2.0]
  """
  return value_and_hvp(loss, params, v, *args, mode=mode)[1]


def quadratic_forms(
  loss: Callable[..., Float[Array, ""]],
  params: PyTree,
  v: PyTree,
  *args: Any,
  mode: str = "forward_over_reverse",
) -> dict[str, Float[Array, ""]]:
  """Returns v_l . (H v)_l of every leaf l, from one Hessian-vector product.

  Summed over the leaves this is v . H v. Over random signs v, the expectation
  of leaf l's is the trace of its own block of H.

  Args:
    loss, params, v, *args, mode: as for `hvp`.

  Returns:
    {slash path: scalar}, float32 or, for float64 leaves, float64.

  Raises:
    ValueError: as for `hvp`.

  >>> loss = lambda params: params["a"] ** 2 + 3 * params["a"] * params["b"]
  >>> params, v = {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": -1.0}
  >>> params, v = jax.tree.map(jnp.float32, (params, v))
  >>> {name: float(x) for name, x in quadratic_forms(loss, params, v).items()}
  {'a': -1.0, 'b': -3.0}
  """
  return dots(v, hvp(loss, params, v, *args, mode=mode))


def value_and_hvp(
  loss: Callable[..., Float[Array, ""]],
  params: PyTree,
  v: PyTree,
  *args: Any,
  mode: str,
) -> tuple[Float[Array, ""], PyTree]:
  """Returns (loss, H v); see `hvp`."""
  check_mode(mode)
  _check_vector(params, v)

  def gradient(params):
    value, gradient = jax.value_and_grad(loss)(params, *args)
    return gradient, value

  if mode == "forward_over_reverse":
    _, product, value = jax.jvp(gradient, (params,), (v,), has_aux=True)
  else:
    _, pull, value = jax.vjp(gradient, params, has_aux=True)
    (product,) = pull(v)
  return value, product


def dots(v: PyTree, product: PyTree) -> dict[str, Float[Array, ""]]:
  """Returns {slash path: inner product} of two trees, leaf by leaf."""
  v, product = (named_leaves(tree) for tree in (v, product))
  return {path: _dot(v[path], product[path]) for path in v}


def check_mode(mode: str) -> None:
  """Raises a ValueError for an unknown mode."""
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def _dot(a, b):
  # Sums in half precision would lose the small terms.
  dtype = jnp.float64 if a.dtype == jnp.float64 else jnp.float32
  return (a.astype(dtype) * b.astype(dtype)).sum()


def _check_vector(params, v):
  expected, given = named_leaves(params), named_leaves(v)
  for path in {**expected, **given}:
    field = f"v/{path}".removesuffix("/")
    if path not in given:
      raise ValueError(
        f"{field} must be {_describe(expected[path])}, but is missing"
      )
    if path not in expected:
      raise ValueError(
        f"{field} is not in params, which has {', '.join(expected)}"
      )
    found, right = _describe(given[path]), _describe(expected[path])
    if found != right:
      raise ValueError(f"{field} must be {right}, got {found}")
  structure, other = jax.tree.structure(params), jax.tree.structure(v)
  if structure != other:
    raise ValueError(f"v must have the structure {structure}, got {other}")


def _describe(leaf):
  kind = jax.typeof(leaf)
  return f"{kind.dtype} {kind.shape}"
