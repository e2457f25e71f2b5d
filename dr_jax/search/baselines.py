"""Allocations without a search: what a search must beat.

  uniform       the same bit-width everywhere
  random        a random assignment that fills the budget
  proportional  few bits where there are many parameters

A larger position in the candidate bit-widths costs less. Measured latencies
may break that: then some assignments are merely within the budget (`nearest`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dr_jax.search.assignments import Genes
from dr_jax.search.evaluator import Evaluator
from dr_jax.search.log import Result, SearchLog
from dr_jax.search.options import Count, Seed, check_options
from dr_jax.search.problem import Problem


def uniform(
  problem: Problem,
  budgets: Mapping[str, int],
  evaluate: Evaluator,
  *,
  seed: Seed = 0,
) -> Result:
  """Takes the highest bit-width that fits everywhere.

  Pinned layers keep theirs. Scores one assignment.

  Args:
    problem, budgets, evaluate: what to assign, {cost: limit}, and the scores.
    seed: not used.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: if only mixed assignments fit, or for a wrong budget.
  """
  check_options(uniform, locals())
  log = SearchLog(problem, budgets, evaluate)
  for position in range(len(problem.bits)):
    index = problem.start(position)
    if problem.fits(index, budgets):
      return log.result(index)
  raise ValueError(
    f"budgets={dict(budgets)}: no bit-width fits everywhere; use a search that "
    "mixes them"
  )


def random(
  problem: Problem,
  budgets: Mapping[str, int],
  evaluate: Evaluator,
  *,
  seed: Seed = 0,
  draws: Count = 1,
) -> Result:
  """Draws assignments that fill the budget; takes the best.

  Every group of layers draws one of its bit-widths, all equally likely; then
  `Genes.repair` brings the assignment to the budget, from above or from below.

  Args:
    problem, budgets, evaluate: what to assign, {cost: limit}, and the scores.
    seed: of the draws.
    draws: number of assignments, at least 1; equal ones are scored once.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: for a wrong budget or number of draws.
  """
  check_options(random, locals())
  log = SearchLog(problem, budgets, evaluate)
  rng = np.random.Generator(np.random.PCG64(seed))
  genes = Genes(problem, budgets)
  for _ in range(draws):
    log(genes.index(genes.repair(genes.draw(rng), rng)))
  return log.result()


def proportional(
  problem: Problem,
  budgets: Mapping[str, int],
  evaluate: Evaluator,
  *,
  seed: Seed = 0,
) -> Result:
  """Gives few bits to layers with many parameters n_l, without looking.

    maximize  sum_l b_l / n_l   within the budgets

  This is `hessian_ilp` with its objective "bits" when all traces are alike:
  the two differ by what the Hessian knows. Scores one assignment.

  Args:
    problem, budgets, evaluate: what to assign, {cost: limit}, and the scores.
    seed: not used.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: for a wrong budget.
  """
  check_options(proportional, locals())
  log = SearchLog(problem, budgets, evaluate)
  parameters = np.array([row.parameters for row in problem.table], np.float64)
  bits = np.array(problem.bits, np.float64)
  return log.result(problem.solve(-bits / parameters[:, None], budgets))
