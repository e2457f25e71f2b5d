"""All best allocations under one budget, by dynamic programming.

  front(l) = undominated(front(l - 1) + column j of layer l, for all j)

A partial allocation that another one beats in cost and sensitivity can be part
of no best one, so that every point of the front survives, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dr_jax.allocate.problem import Problem, check
from dr_jax.allocate.solve import Infeasible, Solution

if TYPE_CHECKING:
  from numpy.typing import ArrayLike

_NAME = "cost"

# Bits of a summed sensitivity, which leave int64 its sign and a carry.
_BITS = 61


class Front(NamedTuple):
  """Best allocations, from the cheapest to the least sensitive.

  Attributes:
    cost: int64 [P], strictly increasing.
    objective: float64 [P], `math.fsum` of the chosen sensitivities, strictly
      decreasing.
    index: int32 [P, L], the columns of every layer.
  """

  cost: np.ndarray
  objective: np.ndarray
  index: np.ndarray

  def at(self, budget: int) -> Solution:
    """Returns the best allocation within a budget.

    Raises:
      Infeasible: if even the cheapest one costs more.
    """
    place = int(np.searchsorted(self.cost, budget, side="right")) - 1
    if place < 0:
      smallest = int(self.cost[0])
      raise Infeasible(
        f"budget must be >= {smallest}, the smallest cost, got {budget}",
        _NAME,
        (smallest,),
        budget,
      )
    return Solution(
      index=self.index[place].astype(np.int64),
      objective=float(self.objective[place]),
      usage={_NAME: int(self.cost[place])},
    )


def pareto(
  sensitivity: ArrayLike,
  cost: ArrayLike,
  *,
  ties: Sequence[Sequence[int]] = (),
  pinned: Mapping[int, int] | None = None,
) -> Front:
  """Finds the whole front of summed cost against summed sensitivity.

  Sums of sensitivity are compared in fixed point, in units of 2^-61 of the
  range of all sums: more finely than float64 does, and in no order that
  matters. Costs are exact. Among equal points the one found from the smaller
  columns of the last layers wins.

  The front has a few thousand points for the layers of a network, whose costs
  share divisors, and may have hundreds of thousands for unrelated costs: time
  and memory (8 bytes per point and layer, on the way, too) grow with it.

  Args:
    sensitivity: [L, B] finite numbers.
    cost: [L, B] integers of at least 0.
    ties: groups of layer numbers that share a column.
    pinned: {layer number: column}.

  Raises:
    ValueError: if an argument is wrong, naming it.

  >>> front = pareto([[0.0, 1.0], [0.0, 5.0]], [[80, 40], [240, 120]])
  >>> front.cost.tolist(), front.objective.tolist()
  ([160, 200, 280, 320], [6.0, 5.0, 1.0, 0.0])
  >>> front.at(300).index.tolist()
  [1, 0]
  """
  problem = check(sensitivity, {_NAME: cost}, ties, pinned)
  costs, values = problem.cost(_NAME), _fixed_point(problem.objective)
  total, value = np.zeros(1, np.int64), np.zeros(1, np.int64)
  steps = []
  for entries, losses in zip(costs, values, strict=True):
    size = len(total)
    # Column by column, n sorted runs: a stable sort merges them.
    total = (entries[:, None] + total).ravel()
    value = (losses[:, None] + value).ravel()
    kept = _undominated(total, value)
    total, value = total[kept], value[kept]
    column, parent = np.divmod(kept, size)
    steps.append((parent.astype(np.int32), column.astype(np.int16)))
  return _front(problem, total, _choices(steps))


def _fixed_point(objective: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Cuts integers of any size to int64 whose sums have 61 bits."""
  shifted = [column - column.min() for column in objective]
  total = sum(int(column.max()) for column in shifted)
  surplus = max(0, total.bit_length() - _BITS)
  return [(column >> surplus).astype(np.int64) for column in shifted]


def _undominated(total: np.ndarray, value: np.ndarray) -> np.ndarray:
  """Returns positions by increasing total and strictly decreasing value."""
  order = np.argsort(total, kind="stable")
  value = value[order]
  better = np.ones(len(order), bool)
  better[1:] = value[1:] < np.minimum.accumulate(value)[:-1]
  order = order[better]
  # Of equal totals the last is the best.
  last = np.ones(len(order), bool)
  last[:-1] = np.diff(total[order]) != 0
  return order[last]


def _choices(steps: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
  """Follows the parents back: int16 [P, V]."""
  place = np.arange(len(steps[-1][0]))
  choices = np.empty((len(place), len(steps)), np.int16)
  for v in reversed(range(len(steps))):
    parent, column = steps[v]
    choices[:, v] = column[place]
    place = parent[place]
  return choices


def _front(problem: Problem, total: np.ndarray, choices: np.ndarray) -> Front:
  index = np.empty((len(total), len(problem.sensitivity)), np.int32)
  for v, (group, columns) in enumerate(
    zip(problem.groups, problem.columns, strict=True)
  ):
    index[:, list(group)] = columns[choices[:, v]][:, None]
  chosen = problem.sensitivity[np.arange(index.shape[1]), index]
  objective = np.array([math.fsum(row) for row in chosen.tolist()])
  # What differs by less than float64 shows is not a separate point.
  kept = np.ones(len(total), bool)
  kept[1:] = objective[1:] < np.minimum.accumulate(objective)[:-1]
  return Front(total[kept], objective[kept], index[kept])
