"""Greedy search: lower what costs least accuracy, until the budget holds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dr_jax.search.baselines import nearest
from dr_jax.search.problem import Ledger, Problem, Result


def greedy(
  problem: Problem,
  budgets: Mapping[str, int],
  *,
  seed: int = 0,
  per_cost: bool = False,
) -> Result:
  """Walks from the highest bit-widths down into the budget.

  Each step scores the lowering of every layer by one position and keeps the
  one that `problem.rank` puts first: the least loss, whatever it saves. The
  best assignment within the budgets is returned: where the walk ends, or
  another one of its trials that fits.

  Args:
    problem, budgets: what to assign, and {cost: limit}.
    seed: not used.
    per_cost: keep the lowering with the least rise of the loss (fall of the
      accuracy, if that is preferred) per saved cost instead. Lowerings that
      improve all count as 0; then `problem.rank` decides.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: for a wrong budget, or per_cost with several.

  References:
    Bit-Mixer, ICCV 2021: from its text, for there is no public code. Its
    budget is the mean bit-width.
  """
  ledger = Ledger(problem, budgets)
  if per_cost and len(budgets) > 1:
    raise ValueError(
      f"budgets must be a single one with per_cost=True, got {len(budgets)}"
    )
  index = problem.start(0)
  ledger(index)
  while not problem.fits(index, budgets):
    moves = _lowered(problem, index)
    if not moves:
      # Costs that rise with fewer bits: the way down did not lead there.
      ledger(nearest(problem, budgets, index))
      break
    for move in moves:
      ledger(move)
    index = min(moves, key=_order(problem, budgets, ledger, index, per_cost))
  return ledger.result()


def _lowered(problem: Problem, index: np.ndarray) -> list[np.ndarray]:
  """The assignments with one group lowered by one position."""
  moves = []
  for group in problem.groups():
    if index[group[0]] < len(problem.bits) - 1:
      moves.append(index.copy())
      moves[-1][list(group)] += 1
  return moves


def _order(problem, budgets, ledger, index, per_cost):
  """Sorts moves away from an assignment: the first is the one to make."""
  if not per_cost:
    return lambda move: problem.rank(ledger(move))
  (name,) = budgets
  score, cost = problem.rank(ledger(index))[0], problem.cost(index)[name]

  def order(move):
    rank, saved = problem.rank(ledger(move)), cost - problem.cost(move)[name]
    harm = max(0.0, rank[0] - score)  # NaN, from two infinite ones, gives 0.
    return harm / saved if saved > 0 else math.inf, rank

  return order
