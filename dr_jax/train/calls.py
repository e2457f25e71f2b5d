"""Several training steps in one call of a compiled program.

A call costs the host's time, whatever the network: small networks on an
accelerator wait for it. `jax.lax.scan` repeats the step over batches that the
program stacks on the device. XLA:CPU runs convolutions in a scan some twenty
times slower.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from dr_jax.runtime.compilation import jit
from dr_jax.runtime.tree import stack

_T = TypeVar("_T")


def in_one_call(step: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a compiled function that makes a step with each of some batches.

  Args:
    step: traceable `step(state, batch) -> (state, ...)`.

  Returns:
    `steps(state, batches)`, with what the step returns besides the state
    stacked along a first axis, [steps, ...]. It donates the state. Another
    number of batches compiles another program.

  >>> import jax.numpy as jnp
  >>> steps = in_one_call(lambda state, batch: (state + batch, state * batch))
  >>> total, products = steps(jnp.int32(1), (jnp.int32(2), jnp.int32(3)))
  >>> int(total), products.tolist()
  (6, [2, 9])
  """

  @functools.partial(jit, donate_argnums=0)
  def steps(state, batches):
    def one(state, batch):
      state, *results = step(state, batch)
      return state, tuple(results)

    state, results = jax.lax.scan(one, state, stack(batches))
    return state, *results

  return steps


def one_by_one(step: Callable[..., Any]) -> Callable[..., Any]:
  """As `in_one_call`, of a step that is several programs: a call for each."""

  def steps(state, batches):
    results = []
    for batch in batches:
      state, *result = step(state, batch)
      results.append(tuple(result))
    return state, *_stack(results)

  return steps


_stack: Callable[[Sequence[Any]], Any] = jax.jit(stack)


def grouped(
  batches: Iterator[_T], size_at: Callable[[int], int], start: int
) -> Iterator[tuple[_T, ...]]:
  """Yields batches in the groups that calls take.

  Args:
    batches: of the steps from `start` on.
    size_at: how many steps the call makes that begins after `step` steps.
    start: number of the steps before.

  >>> list(grouped(iter("abcde"), lambda step: 2 if step < 3 else 1, 0))
  [('a', 'b'), ('c', 'd'), ('e',)]
  """
  step = start
  while group := tuple(itertools.islice(batches, size_at(step))):
    yield group
    step += len(group)
