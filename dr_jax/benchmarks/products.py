"""The products of a program: how many multiply-accumulates, and of what."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Product(NamedTuple):
  """A convolution or a product of matrices.

  Attributes:
    macs: multiply-accumulates of all its executions.
    of_layer: whether one operand depends on no input: on parameters alone.
    in_integers: whether an operand has 8 bits.
  """

  macs: int
  of_layer: bool
  in_integers: bool


def products(f: Callable[..., Any], *inputs: Any) -> list[Product]:
  """Returns the products of f(*inputs), which is traced and not run."""
  closed = jax.make_jaxpr(f)(*inputs)
  found: list[Product] = []
  _follow(closed.jaxpr, [True] * len(closed.jaxpr.invars), 1, found)
  return found


def _follow(jaxpr, depends, times, found) -> list[bool]:
  """Adds the products of a program; returns which outputs depend on inputs."""
  known = dict(zip(jaxpr.invars, depends, strict=True))

  def of(v):
    return False if isinstance(v, jax.extend.core.Literal) else known.get(v)

  for step in jaxpr.eqns:
    operands = [bool(of(v)) for v in step.invars]
    results = [any(operands)] * len(step.outvars)
    name = step.primitive.name
    if name in ("dot_general", "conv_general_dilated"):
      found.append(
        Product(
          times * _macs(step),
          not all(operands[:2]),
          any(v.aval.dtype == jnp.int8 for v in step.invars[:2]),
        )
      )
    elif name == "scan":
      first = step.params["num_consts"]
      carried = first + step.params["num_carry"]
      inner = step.params["jaxpr"].jaxpr
      for _ in inner.outvars:  # what a carry depends on comes round
        outputs = _follow(inner, operands, 0, [])
        for i in range(first, carried):
          operands[i] |= outputs[i - first]
      length = times * step.params["length"]
      results = _follow(inner, operands, length, found)
    elif (inner := next(_inner(step), None)) is not None:
      results = _follow(inner, operands, times, found)
    known.update(zip(step.outvars, results, strict=True))
  return [bool(of(v)) for v in jaxpr.outvars]


def _inner(step) -> Iterator[Any]:
  """The program that a step calls with its operands."""
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    if (inner := step.params.get(name)) is not None:
      inner = getattr(inner, "jaxpr", inner)
      if len(inner.invars) == len(step.invars):
        yield inner


def _macs(step):
  x, w = (v.aval for v in step.invars[:2])
  (y,) = (v.aval for v in step.outvars)
  if step.primitive.name == "dot_general":
    (axes, _), _ = step.params["dimension_numbers"]
    return y.size * math.prod(x.shape[axis] for axis in axes)
  numbers = step.params["dimension_numbers"]
  window = w.size // w.shape[numbers.rhs_spec[0]]
  if math.prod(step.params["lhs_dilation"]) > 1:  # each input once
    groups = step.params["feature_group_count"]
    return x.size * (w.size // w.shape[numbers.rhs_spec[1]]) // groups
  return y.size * window
