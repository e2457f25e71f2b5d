"""Exact minimum of a multiple-choice knapsack, in integers.

  minimize    sum_v objective[v][x_v]
  subject to  sum_v rows[v][x_v, m] <= limits[m]   for every row m

HiGHS stops on absolute gaps and tolerances, so that by itself it may call a
second-best assignment optimal. Here its solution is only the first incumbent,
an upper bound U, and the duals y >= 0 of the linear relaxation price the rows.
For any y >= 0, an assignment with an objective of at most U has

  sum_v r[v][x_v] <= U - bound(y),
  r[v][j] = objective[v][j] + y . rows[v][j], less its minimum over j,

with reduced costs r, which few assignments satisfy when y is good. These are
enumerated, variable by variable, with objectives and rows in exact integers;
floats prune only what exceeds U by more than their rounding. Where they are
many, branch and bound: the columns of one variable are split and each part
gets its own prices.

References:
  Balas and Zemel, Operations Research 28 (1980): the core of a knapsack.
  Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse

# Sums in int64 stay below this; objectives above it become Python integers.
LARGEST = 2**62

# HiGHS compares objectives to 1e-6: with a largest entry of 1e5 that is 1e-11
# of it.
_OBJECTIVE_SCALE = 1e5

# Enough for all but subset sums, where HiGHS would not terminate.
_MAX_NODES = 2000

# Partial assignments that are enumerated at once, and with how many of them all
# others are compared where there are several rows.
_MAX_STATES = 1 << 13
_MAX_DOMINATORS = 64


class Unsettled(RuntimeError):
  """The search needs more parts than allowed."""


class Program(NamedTuple):
  """Columns of every variable.

  Attributes:
    objective: per variable [n] integers of any size (dtype object).
    rows: per variable int64 [n, M].
    limits: M integers.
  """

  objective: tuple[np.ndarray, ...]
  rows: tuple[np.ndarray, ...]
  limits: tuple[int, ...]


def minimize(program: Program, *, parts: float = math.inf) -> np.ndarray | None:
  """Returns the best assignment, or None where no assignment is feasible.

  Among equal objectives the smallest sum of the first row wins, then of the
  second and so on, then the lowest position of the first variable and so on.

  Args:
    program: what to minimize; sums of a row stay within +-2^62.
    parts: how often a program may be split before it is given up.

  Returns:
    int64 [V], a position among the columns of every variable.

  Raises:
    Unsettled: when given up.
  """
  program = _normalize(program)
  index = _incumbent(program)
  if index is None:
    index = _feasible(program, parts)
  if index is None:
    return None
  if program.limits:
    # The first row breaks ties within the objective, so that bounds do, too.
    firsts = [rows[:, 0].astype(object) for rows in program.rows]
    weight = 1 + sum(first.max() for first in firsts)
    pairs = zip(program.objective, firsts, strict=True)
    objective = tuple(value * weight + first for value, first in pairs)
    program = program._replace(objective=objective)
  return _search(program, _value(program, index), parts)


def _normalize(program: Program) -> Program:
  """Shifts every variable's minima to 0, divides rows by their divisor.

  Afterwards objectives and rows only grow with every variable, and a limit that
  the divisor rules out (the parity of a sum) is seen at once.
  """
  objective = tuple(column - column.min() for column in program.objective)
  lows = [rows.min(0) for rows in program.rows]
  rows = [part - low for part, low in zip(program.rows, lows, strict=True)]
  divisor = np.maximum(np.gcd.reduce(np.concatenate(rows)), 1)
  limits = tuple(
    (limit - int(low)) // int(d)
    for limit, low, d in zip(
      program.limits, np.sum(lows, 0), divisor, strict=True
    )
  )
  return Program(objective, tuple(part // divisor for part in rows), limits)


def _value(program: Program, index: Sequence[int] | np.ndarray) -> int:
  pairs = zip(program.objective, index, strict=True)
  return sum(int(column[j]) for column, j in pairs)


def _usage(program: Program, index: Sequence[int] | np.ndarray) -> np.ndarray:
  return np.sum([r[j] for r, j in zip(program.rows, index, strict=True)], 0)


class _Scaled(NamedTuple):
  """A normalized program in floats: objectives to 1, rows to their limits."""

  objective: list[np.ndarray]  # [n]
  rows: list[np.ndarray]  # [n, M]
  limits: np.ndarray  # [M]
  unit: int  # what objective 1 stands for

  def matrices(self) -> tuple[np.ndarray, np.ndarray, sparse.csr_array]:
    """Returns objective [columns], rows [M, columns], one-hot [V, columns]."""
    sizes = [len(column) for column in self.objective]
    variable = np.repeat(np.arange(len(sizes)), sizes)
    places = (variable, np.arange(len(variable)))
    one_hot = sparse.csr_array((np.ones(len(variable)), places))
    objective = np.concatenate(self.objective) * _OBJECTIVE_SCALE
    return objective, np.concatenate(self.rows).T, one_hot

  def split(self, x: np.ndarray) -> list[np.ndarray]:
    """Splits [columns] into [n] per variable."""
    return np.split(x, np.cumsum([len(part) for part in self.objective])[:-1])


def _scale(program: Program) -> _Scaled:
  unit = max(1, *(int(column.max()) for column in program.objective))
  # int / int rounds correctly at any size.
  objective = [
    np.array([int(value) / unit for value in column])
    for column in program.objective
  ]
  scale = np.maximum(np.array(program.limits, np.float64), 1)
  # What alone exceeds a limit does so at 2, too; HiGHS refuses large entries.
  rows = [np.minimum(part / scale, 2) for part in program.rows]
  return _Scaled(objective, rows, np.array(program.limits) / scale, unit)


def _incumbent(program: Program) -> list[int] | None:
  """Returns HiGHS's solution if it is feasible in integers."""
  scaled = _scale(program)
  objective, rows, one_hot = scaled.matrices()
  constraints = [optimize.LinearConstraint(one_hot, 1, 1)]
  if len(rows):
    constraints.append(optimize.LinearConstraint(rows, ub=scaled.limits))
  solution = optimize.milp(
    objective,
    integrality=np.ones(len(objective)),
    bounds=optimize.Bounds(0, 1),
    constraints=constraints,
    options={"mip_rel_gap": 0, "node_limit": _MAX_NODES},
  )
  if solution.x is None:
    return None
  index = [int(part.argmax()) for part in scaled.split(solution.x)]
  if (_usage(program, index) > np.array(program.limits)).any():
    return None
  return index


def _feasible(program: Program, parts: float) -> list[int] | np.ndarray | None:
  """Returns any feasible assignment of a normalized program.

  Row after row: among assignments within the rows before, the next row, taken
  as the objective, must come down to its limit.
  """
  found = [0] * len(program.rows)
  for m, limit in enumerate(program.limits):
    if _usage(program, found)[m] <= limit:
      continue
    part = Program(
      tuple(rows[:, m].astype(object) for rows in program.rows),
      tuple(rows[:, :m] for rows in program.rows),
      program.limits[:m],
    )
    found = _search(part, limit, parts)
    if found is None:
      return None
  return found


def _search(program: Program, upper: int, parts: float) -> np.ndarray | None:
  """Returns the best assignment with an objective of at most `upper`."""
  best = None
  waiting = [[np.arange(len(column)) for column in program.objective]]
  while waiting:
    kept = waiting.pop()
    part = _take(program, kept)
    low = sum(int(column.min()) for column in part.objective)
    part = _normalize(part)
    if min(part.limits, default=0) < 0:
      continue
    enumeration = _Enumeration(part, upper - low)
    kept = [k[near] for k, near in zip(kept, enumeration.near, strict=True)]
    states = enumeration.run()
    if states is None:
      v = enumeration.branching()
      splits = [[*kept[:v], one, *kept[v + 1 :]] for one in kept[v][:, None]]
      waiting += splits
      parts -= len(splits)
      if parts < 0:
        raise Unsettled
    elif len(states.value):
      choices = _first(states)
      index = [int(k[j]) for k, j in zip(kept, choices, strict=True)]
      value = _value(program, index)
      rank = (value, *_usage(program, index).tolist(), *index)
      if value <= upper and (best is None or rank < best):
        best, upper = rank, value
  return None if best is None else np.array(best[-len(program.rows) :])


def _take(program: Program, kept: Sequence[np.ndarray]) -> Program:
  """Returns the program of some columns of every variable."""
  return Program(
    tuple(f[k] for f, k in zip(program.objective, kept, strict=True)),
    tuple(r[k] for r, k in zip(program.rows, kept, strict=True)),
    program.limits,
  )


class _States(NamedTuple):
  """Partial assignments, in lexicographic order."""

  choices: np.ndarray  # int16 [P, V], columns of the variables so far
  value: np.ndarray  # [P], exact: int64 or Python integers
  usage: np.ndarray  # int64 [P, M]
  spent: np.ndarray  # float64 [P], the sum of r

  def take(self, kept: np.ndarray) -> _States:
    return _States(*(field[kept] for field in self))


class _Enumeration:
  """All assignments of a normalized program with objectives of at most `upper`.

  Attributes:
    near: per variable the columns that such an assignment may have.
  """

  def __init__(self, program: Program, upper: int):
    scaled = _scale(program)
    relaxed = _relax(scaled)
    prices, self._relaxed = relaxed.prices, relaxed.x
    priced = [
      column + rows @ prices
      for column, rows in zip(scaled.objective, scaled.rows, strict=True)
    ]
    credit = float(prices @ scaled.limits)
    bound = math.fsum(column.min() for column in priced) - credit
    # Far above the rounding of these sums, 2^-53 of their size per term.
    size = math.fsum(column.max() for column in priced) + credit
    self._room = upper / scaled.unit - bound + 1e-13 * (1 + size)
    if not relaxed.feasible:
      self._room = -math.inf
    reduced = [column - column.min() for column in priced]
    self.near = [np.flatnonzero(r <= self._room) for r in reduced]
    self._reduced = [r[k] for r, k in zip(reduced, self.near, strict=True)]
    total = sum(int(column.max()) for column in program.objective)
    kind = np.int64 if total < LARGEST else object
    self._objective = [
      column.astype(kind)[k]
      for column, k in zip(program.objective, self.near, strict=True)
    ]
    self._rows = [r[k] for r, k in zip(program.rows, self.near, strict=True)]
    self._limits = np.array(program.limits, np.int64)

  def run(self) -> _States | None:
    """Returns them, in positions of `near`, or None where they are many."""
    states = _States(
      np.zeros((1, len(self._rows)), np.int16),
      np.zeros(1, self._objective[0].dtype),
      np.zeros((1, len(self._limits)), np.int64),
      np.zeros(1),
    )
    for v in range(len(self._rows)):
      states = self._extend(states, v)
      if len(states.value) > _MAX_STATES:
        return None
    return states

  def branching(self) -> int:
    """Returns the variable to split: the most fractional in the relaxation."""
    pairs = zip(self._relaxed, self.near, strict=True)
    return max(
      (v for v, near in enumerate(self.near) if len(near) > 1),
      key=[(1 - x.max(), len(near)) for x, near in pairs].__getitem__,
    )

  def _extend(self, states: _States, v: int) -> _States:
    spent = states.spent[:, None] + self._reduced[v]
    usage = states.usage[:, None] + self._rows[v]
    unpruned = (spent <= self._room) & (usage <= self._limits).all(2)
    parent, column = np.nonzero(unpruned)
    choices = states.choices[parent]
    choices[:, v] = column
    extended = _States(
      choices,
      states.value[parent] + self._objective[v][column],
      usage[parent, column],
      spent[parent, column],
    )
    return extended.take(_undominated(extended))


class _Relaxed(NamedTuple):
  """The linear relaxation: prices [M] >= 0, and x per variable."""

  prices: np.ndarray
  x: list[np.ndarray]
  feasible: bool


def _relax(scaled: _Scaled) -> _Relaxed:
  objective, rows, one_hot = scaled.matrices()
  free = _Relaxed(np.zeros(len(rows)), scaled.split(objective * 0 + 1), True)
  if not len(rows):
    return free
  relaxed = optimize.linprog(
    objective,
    A_ub=rows,
    b_ub=scaled.limits,
    A_eq=one_hot,
    b_eq=np.ones(len(free.x)),
    bounds=(0, 1),
    method="highs",
  )
  if relaxed.status != 0:
    # 2: infeasible by more than its tolerance, 1e-7 of a limit, which is far
    # above the rounding of an assignment that is feasible in integers.
    return free._replace(feasible=relaxed.status != 2)
  prices = np.maximum(-relaxed.ineqlin.marginals, 0) / _OBJECTIVE_SCALE
  return _Relaxed(prices, scaled.split(relaxed.x), True)


def _first(states: _States) -> np.ndarray:
  """Returns the choices of the best full assignment."""
  states = states.take(np.flatnonzero(states.value == states.value.min()))
  keys = (*states.usage.T[::-1], np.zeros(len(states.value)))
  return states.choices[np.lexsort(keys)[0]]


def _undominated(states: _States) -> np.ndarray:
  """Returns the positions of states of which no other is as good in all.

  With several rows, states are compared only with equal rows and with those of
  lowest reduced cost, which leaves some dominated ones.
  """
  value, usage = states.value, states.usage
  if not len(value):
    return np.zeros(0, np.int64)
  if value.dtype == object:
    value = np.unique(value, return_inverse=True)[1]
  order = np.lexsort((value, *usage.T[::-1]))
  new = np.ones(len(order), bool)
  new[1:] = (np.diff(usage[order], axis=0) != 0).any(1)
  order = order[new]
  value, usage = value[order], usage[order]
  if usage.shape[1] <= 1:
    new = np.ones(len(order), bool)
    new[1:] = value[1:] < np.minimum.accumulate(value)[:-1]
    return np.sort(order[new])
  dominated = np.zeros(len(order), bool)
  for dominator in np.argsort(states.spent[order], kind="stable")[
    :_MAX_DOMINATORS
  ]:
    worse = (value[dominator] <= value) & (usage[dominator] <= usage).all(1)
    worse[dominator] = False
    dominated |= worse
  return np.sort(order[~dominated])
