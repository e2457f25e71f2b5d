"""What a stage computes besides training, counted before it does."""

from __future__ import annotations

from typing import NamedTuple

# Of one example, in forward passes. A product with the Hessian takes about two
# gradients (`dr_jax.hessian.hvp`).
FORWARD, GRADIENT, HESSIAN = 1, 3, 6


class Work(NamedTuple):
  """One kind of work of a stage.

  Attributes:
    stage: its name, or that of a part of it.
    what: what is counted.
    least, most: how often it is done.
    examples: that each of them takes.
    cost: of an example, in forward passes.
  """

  stage: str
  what: str
  least: int
  most: int
  examples: int
  cost: int
