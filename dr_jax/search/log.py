"""What a search tried, and what it returns."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dr_jax import allocate
from dr_jax.search.evaluator import Evaluator
from dr_jax.search.problem import Index, Problem, Trial


class Result(NamedTuple):
  """What a search found under its budgets.

  Attributes:
    allocation: layer name -> bits.
    accuracy, loss: on the examples that assignments are scored on.
    cost: {name: what the allocation costs}, for every known cost.
    evaluations: number of different assignments that were scored.
    seconds: duration of the search without the evaluations.
    evaluation_seconds: duration of the evaluations, also of those read back.
    trials: all assignments that were scored, in order.
  """

  allocation: allocate.Allocation
  accuracy: float
  loss: float
  cost: dict[str, int]
  evaluations: int
  seconds: float
  evaluation_seconds: float
  trials: tuple[Trial, ...]


class SearchLog:
  """The trials of one search, and its time."""

  def __init__(
    self, problem: Problem, budgets: Mapping[str, int], evaluate: Evaluator
  ):
    """Starts the clock.

    Raises:
      As `Problem.check`.
    """
    self._started = time.perf_counter()
    self._waited = 0.0
    self._problem, self._budgets = problem, dict(budgets)
    self._evaluate = evaluate
    self._trials: dict[Index, Trial] = {}
    problem.check(budgets)

  def __iter__(self) -> Iterator[Trial]:
    return iter(self._trials.values())

  def __call__(self, index: Sequence[int] | np.ndarray) -> Trial:
    """Scores an assignment, once in this search.

    Raises:
      As `Evaluator`.
    """
    key = tuple(map(int, index))
    if key not in self._trials:
      before = time.perf_counter()
      self._trials[key] = self._evaluate(key)
      self._waited += time.perf_counter() - before
    return self._trials[key]

  def result(self, index: Sequence[int] | np.ndarray | None = None) -> Result:
    """Ends the search.

    Args:
      index: the assignment found; by default the best trial within the budgets.

    Raises:
      ValueError: if it exceeds a budget, or its scores are not finite.
    """
    problem = self._problem
    if index is None:
      fitting = [t for t in self if problem.fits(t.index, self._budgets)]
      index = min(fitting, key=problem.rank).index
    trial = self(index)
    if not (math.isfinite(trial.loss) and math.isfinite(trial.accuracy)):
      raise ValueError(
        "scores of the network must be finite, but the best assignment has "
        f"accuracy={trial.accuracy}, loss={trial.loss}"
      )
    cost = problem.cost(trial.index)
    if not problem.fits(trial.index, self._budgets):
      raise ValueError(f"found {cost}, which exceeds {self._budgets}")
    elapsed = time.perf_counter() - self._started
    return Result(
      allocation=allocate.Allocation.from_index(
        problem.layers, problem.bits, trial.index
      ),
      accuracy=trial.accuracy,
      loss=trial.loss,
      cost=cost,
      evaluations=len(self._trials),
      seconds=elapsed - self._waited,
      evaluation_seconds=sum(t.seconds for t in self),
      trials=tuple(self),
    )
