"""Seconds of programs that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np


def in_turn(
  calls: Sequence[Callable[[], Any]], rounds: Iterable[int]
) -> np.ndarray:
  """Calls all in turn, round after round, so that load hits all alike.

  Compare seconds of the same round: `ratio` does.

  Args:
    calls: what is timed, until its result is ready; compiled before.
    rounds: `range(count)`, or `rows.turns(count)`, which says how far it is.

  Returns:
    Seconds [calls, rounds].
  """
  seconds = []
  for _ in rounds:
    row = []
    for call in calls:
      started = time.perf_counter()
      jax.block_until_ready(call())
      row.append(time.perf_counter() - started)
    seconds.append(row)
  return np.array(seconds).reshape(-1, len(calls)).T


def ratio(seconds: Any, reference: Any) -> float:
  """Median over rounds of seconds over those of the same round.

  >>> ratio([2.0, 6.0, 9.0], [1.0, 2.0, 9.0])
  2.0
  """
  return float(np.median(np.asarray(seconds) / np.asarray(reference)))
