"""Assignments within budgets: as genes, repaired, or the nearest one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dr_jax.search.problem import Index, Problem


class Genes:
  """Assignments as positions of the groups of layers that are free to change.

  Genes are an int64 [G], one position for each of G groups, so that ties and
  pins are kept whatever the genes are.
  """

  def __init__(self, problem: Problem, budgets: Mapping[str, int]):
    """Sums up what groups cost; budgets are of known costs, and feasible."""
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
    """Returns whether genes are within every budget."""
    return bool((self._left(genes) >= 0).all())

  def index(self, genes: np.ndarray) -> Index:
    """Returns the position of every layer."""
    index = self._start.copy()
    free = self._owner >= 0
    index[free] = genes[self._owner[free]]
    return tuple(map(int, index))

  def of(self, index: Index) -> np.ndarray:
    """Returns the genes of an assignment."""
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
    """What every budget has left: negative where it is exceeded."""
    return self._room - self._costs[self._groups, genes].sum(0)


def nearest(
  problem: Problem,
  budgets: Mapping[str, int],
  index: Sequence[int] | np.ndarray,
) -> Index:
  """Returns the assignment within the budgets that is fewest positions away.

  For costs that rise with fewer bits, where lowering layers leads nowhere.
  """
  away = np.abs(np.arange(len(problem.bits)) - np.asarray(index)[:, None])
  return problem.solve(away, budgets)
