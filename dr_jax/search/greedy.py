"""Greedy search: lower what costs the least accuracy, down to the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dr_jax.search.assignments import nearest
from dr_jax.search.evaluator import Evaluator
from dr_jax.search.log import Result, SearchLog
from dr_jax.search.options import Seed, check_options
from dr_jax.search.problem import Problem


def greedy(
  problem: Problem,
  budgets: Mapping[str, int],
  evaluate: Evaluator,
  *,
  seed: Seed = 0,
  per_cost: bool = False,
) -> Result:
  """Lowers layers from the highest bit-width, one at a time, to the budget.

  Each step scores the lowering of every layer by one position and keeps the
  one that `problem.rank` puts first: the smallest loss, whatever it saves.
  Returns the best trial within the budgets: the last step, or another one.

  Args:
    problem, budgets, evaluate: what to assign, {cost: limit}, and the scores.
    seed: not used.
    per_cost: keep the lowering with the smallest rise of the loss (drop of the
      accuracy, if that is the metric) per saved cost instead. Lowerings that
      improve it count as 0; then `problem.rank` decides.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: for a wrong budget, or per_cost with several.

  References:
    Bit-Mixer, ICCV 2021: from its text, as there is no public code. Its budget
    is the mean bit-width.

  >>> from dr_jax import nn, search
  >>> table = nn.LayerTable(
  ...   nn.LayerRow(name, "linear", (4, 4), 1, 16, 16, None, 8) for name in "ab"
  ... )
  >>> problem = search.Problem(
  ...   table=table, bits=(8, 4), costs={"bits": np.array([[8, 4], [8, 4]])}
  ... )
  >>> harm = np.array([0.5, 0.1])  # what 4 bits cost each layer
  >>> evaluate = search.Evaluator(lambda index: (90.0, float(harm @ index)))
  >>> found = search.greedy(problem, {"bits": 12}, evaluate)
  >>> found.allocation, found.loss, found.evaluations
  (Allocation({'a': 8, 'b': 4}), 0.1, 3)
  """
  check_options(greedy, locals())
  log = SearchLog(problem, budgets, evaluate)
  if per_cost and len(budgets) > 1:
    raise ValueError(
      f"budgets must be a single one with per_cost=True, got {len(budgets)}"
    )
  index = problem.start(0)
  log(index)
  while not problem.fits(index, budgets):
    moves = _lowered(problem, index)
    if not moves:
      # Costs that rise with fewer bits: the way down did not lead there.
      log(nearest(problem, budgets, index))
      break
    for move in moves:
      log(move)
    index = min(moves, key=_order(problem, budgets, log, index, per_cost))
  return log.result()


def _lowered(problem: Problem, index: np.ndarray) -> list[np.ndarray]:
  """The assignments with one group lowered by one position."""
  moves = []
  for group in problem.groups():
    if index[group[0]] < len(problem.bits) - 1:
      moves.append(index.copy())
      moves[-1][list(group)] += 1
  return moves


def _order(problem, budgets, log, index, per_cost):
  """Sorts moves away from an assignment: the first is the one to make."""
  if not per_cost:
    return lambda move: problem.rank(log(move))
  (name,) = budgets
  score, cost = problem.rank(log(index))[0], problem.cost(index)[name]

  def order(move):
    rank, saved = problem.rank(log(move)), cost - problem.cost(move)[name]
    harm = max(0.0, rank[0] - score)  # NaN, from two infinite ones, gives 0.
    return harm / saved if saved > 0 else math.inf, rank

  return order
