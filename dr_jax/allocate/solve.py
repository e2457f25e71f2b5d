"""The best allocation of bit-widths to layers under budgets.

  minimize    sum_l sensitivity[l, x_l]
  subject to  sum_l cost[l, x_l] <= budget   for every budget

An integer linear program with one 0/1 variable per layer and bit-width
(arXiv 2011.10680, HAWQ-V3, eq. 11 to 14), solved to proven optimality:
`allocate.branch_and_bound` says how.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dr_jax.allocate import branch_and_bound
from dr_jax.allocate.problem import Problem, check, integer

if TYPE_CHECKING:
  from numpy.typing import ArrayLike

# Splits of a search for the nearest budget, which only a message waits for.
_MAX_SPLITS = 50


class Infeasible(ValueError):
  """No allocation meets the budgets.

  Attributes:
    budget: name of the budget to change.
    feasible: the nearest values of it that can be met while the others stay:
      the smallest one, or, for a budget to be met exactly, the nearest below
      and above. Empty where none is known.
    smallest: the smallest of `feasible` that is not below the budget, or None.
  """

  def __init__(
    self, message: str, budget: str, feasible: Sequence[int], at: int
  ):
    super().__init__(message)
    self.budget = budget
    self.feasible = tuple(feasible)
    self.smallest = min((a for a in self.feasible if a > at), default=None)


class Solution(NamedTuple):
  """An allocation and what it costs.

  Attributes:
    index: int64 [L], the column of every layer.
    objective: `math.fsum` of the chosen sensitivities.
    usage: {name: sum of the chosen costs}, exact.
  """

  index: np.ndarray
  objective: float
  usage: dict[str, int]


def solve(
  sensitivity: ArrayLike,
  costs: Mapping[str, ArrayLike],
  budgets: Mapping[str, int],
  *,
  equal: Iterable[str] = (),
  ties: Sequence[Sequence[int]] = (),
  pinned: Mapping[int, int] | None = None,
) -> Solution:
  """Finds the allocation of minimum summed sensitivity within all budgets.

  Sums are compared as exact integers, however far sensitivities are apart.
  Among equal ones the smallest use of the first budget wins, then of the
  second and so on, then the smallest column of the first layer and so on: the
  solution is unique. Finding it takes milliseconds to a second for a hundred
  layers; budgets to be met exactly are subset sums, and hard where costs are
  large numbers with nothing in common.

  Args:
    sensitivity: [L, B] finite numbers, of any sign: what layer l loses at its
      candidate bit-width number j.
    costs: {name: [L, B] integers of at least 0}; the largest entries of all
      layers add up to less than 2^62. A cost without a budget is reported
      only.
    budgets: {name: integer of at least 1}, upper bounds of summed costs.
    equal: names of budgets that must be met exactly.
    ties: groups of layer numbers that share a column.
    pinned: {layer number: column}.

  Raises:
    Infeasible: if no allocation meets the budgets.
    ValueError: if an argument is wrong, naming it.

  References:
    arXiv 2011.10680, section 3.4.

  >>> sensitivity = [[0.0, 1.0], [0.0, 5.0]]  # two layers, 8 or 4 bits
  >>> costs = {"bits": [[80, 40], [240, 120]]}
  >>> solution = solve(sensitivity, costs, {"bits": 300})
  >>> solution.index.tolist(), solution.objective, solution.usage
  ([1, 0], 1.0, {'bits': 280})
  >>> solve(sensitivity, costs, {"bits": 100})
  Traceback (most recent call last):
  dr_jax.allocate.solve.Infeasible: ...
  """
  problem = check(sensitivity, costs, ties, pinned)
  budgets = _check_budgets(budgets, problem.costs)
  exactly = _check_equal(equal, budgets)
  positions = branch_and_bound.minimize(
    _program(problem, problem.objective, budgets, exactly)
  )
  if positions is None:
    raise _infeasible(problem, budgets, exactly)
  return solution(problem, problem.spread(positions))


def solution(problem: Problem, index: np.ndarray) -> Solution:
  """Returns an allocation with its sums."""
  layers = np.arange(len(index))
  return Solution(
    index=index,
    objective=math.fsum(problem.sensitivity[layers, index]),
    usage={n: int(c[layers, index].sum()) for n, c in problem.costs.items()},
  )


def _check_budgets(
  budgets: Mapping[str, int], costs: Mapping[str, np.ndarray]
) -> dict[str, int]:
  checked = {}
  for name, value in budgets.items():
    if name not in costs:
      raise ValueError(
        f"budgets must be of the costs {list(costs)}, got {name!r}"
      )
    checked[name] = integer(f"budgets[{name!r}]", value, at_least=1)
  return checked


def _check_equal(
  equal: Iterable[str], budgets: Mapping[str, int]
) -> frozenset[str]:
  names = [equal] if isinstance(equal, str) else list(equal)
  for name in names:
    if name not in budgets:
      raise ValueError(
        f"equal must be of the budgets {list(budgets)}, got {name!r}"
      )
  return frozenset(names)


def _program(
  problem: Problem,
  objective: Sequence[np.ndarray],
  budgets: Mapping[str, int],
  exactly: frozenset[str],
  more: Sequence[tuple[Sequence[np.ndarray], int]] = (),
) -> branch_and_bound.Program:
  """Builds the integer program; `more` are further rows and limits."""
  rows: list[tuple[Sequence[np.ndarray], int]] = []
  for name, budget in budgets.items():
    # Larger budgets mean the same and would not fit int64.
    budget = min(budget, branch_and_bound.LARGEST)
    rows.append((problem.cost(name), budget))
    if name in exactly:
      rows.append(([-cost for cost in problem.cost(name)], -budget))
  rows += more
  per_variable = [
    np.stack([cost[v] for cost, _ in rows], 1)
    if rows
    else np.zeros((len(columns), 0), np.int64)
    for v, columns in enumerate(problem.columns)
  ]
  limits = tuple(limit for _, limit in rows)
  return branch_and_bound.Program(tuple(objective), tuple(per_variable), limits)


def _infeasible(
  problem: Problem, budgets: Mapping[str, int], exactly: frozenset[str]
) -> Infeasible:
  """Says which budget to change, and to what.

  Where changing one budget is not enough, it speaks of the first of the
  smallest sets of budgets that contradict each other.
  """
  within = dict(budgets)
  changes = _changes(problem, within, exactly)
  if not changes:
    within = _contradiction(problem, budgets, exactly)
    changes = _changes(problem, within, exactly)
  name = next(iter(changes or within))
  fixed = [f"{other!r}" for other in within if other != name]
  feasible = " or else ".join(
    f"budgets[{n!r}] "
    + ("" if n in exactly else ">= ")
    + " or ".join(map(str, values))
    for n, values in changes.items()
  )
  message = (
    f"budgets[{name!r}]={budgets[name]} is infeasible: no allocation "
    f"{'meets it exactly' if name in exactly else 'is so small'}"
    f"{' within the budgets of ' + ', '.join(fixed) if fixed else ''}; "
    f"feasible is {feasible or 'unknown'}"
  )
  return Infeasible(message, name, changes.get(name, ()), budgets[name])


def _changes(
  problem: Problem, budgets: Mapping[str, int], exactly: frozenset[str]
) -> dict[str, list[int]]:
  """Returns the nearest feasible values of each budget, the others fixed."""
  changes = {}
  for name, budget in budgets.items():
    others = {n: b for n, b in budgets.items() if n != name}
    cost = problem.cost(name)
    minus = [-part for part in cost]
    if name in exactly:
      limit = min(budget, branch_and_bound.LARGEST)
      sides = [(minus, [(cost, limit)]), (cost, [(minus, -limit)])]
    else:
      sides = [(cost, [])]
    found = []
    for aim, more in sides:
      objective = [part.astype(object) for part in aim]
      program = _program(problem, objective, others, exactly, more)
      try:
        positions = branch_and_bound.minimize(program, parts=_MAX_SPLITS)
      except branch_and_bound.Unsettled:
        continue
      if positions is not None:
        pairs = zip(cost, positions, strict=True)
        found.append(sum(int(part[j]) for part, j in pairs))
    if found:
      changes[name] = found
  return changes


def _contradiction(
  problem: Problem, budgets: Mapping[str, int], exactly: frozenset[str]
) -> dict[str, int]:
  zero = [np.zeros(len(c), object) for c in problem.columns]
  for size in range(1, len(budgets)):
    for names in itertools.combinations(budgets, size):
      part = {name: budgets[name] for name in names}
      program = _program(problem, zero, part, exactly)
      if branch_and_bound.minimize(program) is None:
        return part
  return dict(budgets)
