"""Allocations without a search: what a search must beat.

  uniform       the same bit-width everywhere
  random        a random assignment that fills the budget
  proportional  few bits where there are many parameters

A larger position in the candidate bit-widths costs less. Measured latencies
may break that: then some answers are merely within the budget (`nearest`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dr_jax.allocate.problem import integer
from dr_jax.search.problem import Index, Ledger, Problem, Result


def uniform(
  problem: Problem, budgets: Mapping[str, int], *, seed: int = 0
) -> Result:
  """Takes the highest bit-width that fits everywhere.

  Pinned layers keep theirs. Scores one assignment.

  Args:
    problem, budgets: what to assign, and {cost: limit}.
    seed: not used.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: if only mixed assignments fit, or for a wrong budget.
  """
  ledger = Ledger(problem, budgets)
  for position in range(len(problem.bits)):
    index = problem.start(position)
    if problem.fits(index, budgets):
      return ledger.result(index)
  raise ValueError(
    f"budgets={dict(budgets)}: no bit-width fits everywhere; use a search that "
    "mixes them"
  )


def random(
  problem: Problem,
  budgets: Mapping[str, int],
  *,
  seed: int = 0,
  draws: int = 1,
) -> Result:
  """Draws assignments that fill the budget; takes the best.

  Every group of layers draws one of its bit-widths, all equally likely; then
  `Genes.repair` brings the assignment to the budget, from above or from below.

  Args:
    problem, budgets: what to assign, and {cost: limit}.
    seed: of the draws.
    draws: number of assignments, at least 1; equal ones are scored once.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: for a wrong budget or number of draws.
  """
  ledger = Ledger(problem, budgets)
  check_count("draws", draws, 1)
  rng = np.random.Generator(np.random.PCG64(seed))
  genes = Genes(problem, budgets)
  for _ in range(draws):
    ledger(genes.index(genes.repair(genes.draw(rng), rng)))
  return ledger.result()


def proportional(
  problem: Problem, budgets: Mapping[str, int], *, seed: int = 0
) -> Result:
  """Gives few bits to layers with many parameters n_l, without looking.

    maximize  sum_l b_l / n_l   within the budgets

  This is `hessian_ilp` with its objective "bits" when all traces are alike:
  the two differ by what the Hessian knows. Scores one assignment.

  Args:
    problem, budgets: what to assign, and {cost: limit}.
    seed: not used.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: for a wrong budget.
  """
  ledger = Ledger(problem, budgets)
  parameters = np.array([row.parameters for row in problem.table], np.float64)
  bits = np.array(problem.bits, np.float64)
  return ledger.result(problem.solve(-bits / parameters[:, None], budgets))


class Genes:
  """Assignments as positions of the groups of layers that are free to change.

  Genes are an int64 [G], one position for each of G groups, so that ties and
  pins are kept whatever the genes are.
  """

  def __init__(self, problem: Problem, budgets: Mapping[str, int]):
    """Sums up what groups cost; the budgets are known and feasible."""
    self._problem, self._budgets = problem, dict(budgets)
    self._start = problem.start(0)
    self._owner = np.full(len(self._start), -1)
    groups = problem.groups()
    for number, group in enumerate(groups):
      self._owner[list(group)] = number
    self._groups = np.arange(len(groups))
    names = list(budgets)
    costs = np.stack([np.asarray(problem.costs[n], np.int64) for n in names], 2)
    free = self._owner >= 0
    self._costs = np.zeros((len(groups), *costs.shape[1:]), np.int64)
    np.add.at(self._costs, self._owner[free], costs[free])
    spent = costs[~free, self._start[~free]].sum(0)
    limits = [min(int(budgets[n]), np.iinfo(np.int64).max) for n in names]
    self._room = np.array(limits, np.int64) - spent

  def draw(self, rng: np.random.Generator) -> np.ndarray:
    """Draws genes, all equally likely, whatever they cost."""
    return rng.integers(len(self._problem.bits), size=len(self._groups))

  def fits(self, genes: np.ndarray) -> bool:
    """Whether genes keep every budget."""
    return bool((self._left(genes) >= 0).all())

  def index(self, genes: np.ndarray) -> Index:
    """The position of every layer."""
    index = self._start.copy()
    free = self._owner >= 0
    index[free] = genes[self._owner[free]]
    return tuple(map(int, index))

  def of(self, index: Index) -> np.ndarray:
    """Genes of an assignment."""
    genes = np.zeros(len(self._groups), np.int64)
    free = self._owner >= 0
    genes[self._owner[free]] = np.asarray(index)[free]
    return genes

  def repair(self, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brings genes to the budgets by random steps of one position.

    While they are over a budget, a random group is lowered; then, while some
    group can be raised within the budgets, a random one of these is.

    Args:
      genes: of any cost.
      rng: decides which groups.

    Returns:
      Genes within the budgets.
    """
    genes, last = genes.copy(), len(self._problem.bits) - 1
    movable = list(np.flatnonzero(genes < last))
    while movable and not self.fits(genes):
      number = rng.integers(len(movable))
      genes[movable[number]] += 1
      if genes[movable[number]] == last:
        del movable[number]
    if not self.fits(genes):
      index = self.index(genes)
      genes = self.of(nearest(self._problem, self._budgets, index))
    # Raising costs: a group that cannot be raised now never can be later.
    movable, left = list(np.flatnonzero(genes > 0)), self._left(genes)
    while movable:
      number = rng.integers(len(movable))
      group = movable[number]
      position = genes[group]
      costs = self._costs[group]
      then = left + costs[position] - costs[position - 1]
      fits = (then >= 0).all()
      if fits:
        genes[group], left = position - 1, then
      if not fits or genes[group] == 0:
        del movable[number]
    return genes

  def _left(self, genes):
    """What every budget leaves: negative where it is not kept."""
    return self._room - self._costs[self._groups, genes].sum(0)


def nearest(
  problem: Problem, budgets: Mapping[str, int], index: Sequence[int]
) -> Index:
  """The assignment within the budgets that is the fewest positions away.

  For costs that rise with fewer bits, where lowering layers leads nowhere.
  """
  away = np.abs(np.arange(len(problem.bits)) - np.asarray(index)[:, None])
  return problem.solve(away, budgets)


def check_count(name: str, value: int, at_least: int) -> None:
  """Raises ValueError unless an option is an integer >= `at_least`."""
  integer(name, value, at_least=at_least)
