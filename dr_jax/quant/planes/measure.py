"""Seconds of programs, measured in turn on the device that runs them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def fastest(programs: Mapping[str, Callable[[], Any]], rounds: int = 5) -> str:
  """Returns the name of the program that takes least time.

  Args:
    programs: calls without arguments. One that raises, as a kernel does that
      this device cannot compile, is left out.
    rounds: timed calls of each, after one that compiles.

  Raises:
    RuntimeError: if every program raises.
  """
  able = {}
  for name, program in programs.items():
    try:
      jax.block_until_ready(program())
    except Exception:  # What a compiler raises has no common type.
      continue
    able[name] = program
  if not able:
    raise RuntimeError(f"none of {', '.join(programs)} runs on this device")
  taken = seconds(able, rounds)
  return min(taken, key=taken.__getitem__)


def seconds(
  programs: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
  """Minimum seconds of a call: all programs in turn, so that load hits all."""
  least = dict.fromkeys(programs, math.inf)
  for _ in range(rounds):
    for name, program in programs.items():
      started = time.perf_counter()
      jax.block_until_ready(program())
      least[name] = min(least[name], time.perf_counter() - started)
  return least


def repeated(
  product: Callable[[jax.Array, Any], jax.Array], repeats: int
) -> Callable[[jax.Array, Any], jax.Array]:
  """Returns a program of `repeats` products, one after the other.

  A product of microseconds is shorter than the call of a program. Each input
  waits for the previous result, and nothing made of the weights is kept.

  Args:
    product: `product(x, weights)`, x [m, k]; returns [m, n].
    repeats: at least 1.
  """

  def run(x, weights):
    def step(_, carry):
      x, w = jax.lax.optimization_barrier((carry[0], weights))
      y = product(x, w)
      return x + 0 * y[:, :1].astype(x.dtype), y

    y = product(x, weights)
    return jax.lax.fori_loop(1, repeats, step, (x, y))[1]

  return run
