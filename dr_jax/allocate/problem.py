"""What `solve` and `pareto` are given, checked and brought to integers.

Tied layers become one variable whose entries are their sums; a pinned layer
keeps one column. Sensitivities, which are dyadic numbers, become integers in
units of the largest power of two that divides them all: sums are then exact.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dr_jax.allocate.branch_and_bound import LARGEST


class Problem(NamedTuple):
  """A checked problem of V variables.

  Attributes:
    sensitivity: float64 [L, B].
    costs: {name: int64 [L, B]}.
    groups: per variable its layer numbers, ascending.
    columns: per variable int64 [n], the columns it may take.
    objective: per variable integers of any size [n] (dtype object).
  """

  sensitivity: np.ndarray
  costs: dict[str, np.ndarray]
  groups: tuple[tuple[int, ...], ...]
  columns: tuple[np.ndarray, ...]
  objective: tuple[np.ndarray, ...]

  def cost(self, name: str) -> list[np.ndarray]:
    """Returns a cost per variable, int64 [n]."""
    return self._merge(self.costs[name])

  def spread(self, positions: Iterable[int]) -> np.ndarray:
    """Returns the column of every layer, int64 [L]."""
    index = np.empty(len(self.sensitivity), np.int64)
    for group, columns, position in zip(
      self.groups, self.columns, positions, strict=True
    ):
      index[list(group)] = columns[position]
    return index

  def _merge(self, entries: np.ndarray) -> list[np.ndarray]:
    return [
      entries[list(group)][:, columns].sum(0)
      for group, columns in zip(self.groups, self.columns, strict=True)
    ]


def check(
  sensitivity: Any,
  costs: Mapping[str, Any],
  ties: Sequence[Sequence[int]],
  pinned: Mapping[int, int] | None,
) -> Problem:
  """Checks a problem; the arguments are those of `solve`.

  Raises:
    ValueError: if anything is wrong, naming it.
  """
  values = _check_sensitivity(sensitivity)
  layers, width = values.shape
  checked = {n: _check_cost(n, cost, values.shape) for n, cost in costs.items()}
  groups = _check_ties(ties, layers)
  columns = _check_pinned(pinned or {}, groups, width)
  problem = Problem(values, checked, groups, columns, ())
  return problem._replace(objective=tuple(problem._merge(_integers(values))))


def integer(
  field: str,
  value: Any,
  *,
  at_least: int | None = None,
  below: int | None = None,
) -> int:
  """Returns a Python integer.

  Raises:
    ValueError: for booleans, floats, and integers outside of the bounds.
  """
  rule = "an integer"
  if below is not None:
    rule = f"an integer in {at_least}..{below - 1}"
  elif at_least is not None:
    rule = f"an integer >= {at_least}"
  message = f"{field} must be {rule}, got {value!r}"
  try:
    if isinstance(value, bool | np.bool_):
      raise TypeError
    number = operator.index(value)
  except TypeError:
    raise ValueError(message) from None
  if at_least is not None and number < at_least:
    raise ValueError(message)
  if below is not None and number >= below:
    raise ValueError(message)
  return number


def _check_sensitivity(sensitivity: Any) -> np.ndarray:
  values = np.asarray(sensitivity)
  if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
    raise ValueError(
      "sensitivity must be one number per layer and bit-width, [L, B], got "
      f"{values.dtype} {values.shape}"
    )
  values = values.astype(np.float64)
  wrong = np.argwhere(~np.isfinite(values))
  if len(wrong):
    layer, column = wrong[0].tolist()
    raise ValueError(
      f"sensitivity[{layer}, {column}] must be finite, got "
      f"{values[layer, column]}"
    )
  return values


def _check_cost(name: str, cost: Any, shape: tuple[int, ...]) -> np.ndarray:
  field = f"costs[{name!r}]"
  values = np.asarray(cost)
  if values.shape != shape:
    raise ValueError(
      f"{field} must have the shape of the sensitivity, {shape}, got "
      f"{values.shape}"
    )
  exact = values.astype(object)
  for place in np.ndindex(*shape):
    at = f"{field}[{', '.join(map(str, place))}]"
    integer(at, exact[place], at_least=0)
  total = int(exact.max(1).sum())
  if total >= LARGEST:
    raise ValueError(
      f"{field} must be < 2^62 in sum over the layers, got {total}: use a "
      "larger unit"
    )
  return exact.astype(np.int64)


def _check_ties(
  ties: Sequence[Sequence[int]], layers: int
) -> tuple[tuple[int, ...], ...]:
  """Returns all groups, those of a single layer included, in layer order."""
  tied: dict[int, tuple[int, ...]] = {}
  for group in ties:
    if isinstance(group, str) or not isinstance(group, Iterable):
      raise ValueError(f"ties must be groups of layer numbers, got {ties!r}")
    numbers = tuple(
      sorted(
        integer("ties", layer, at_least=0, below=layers) for layer in group
      )
    )
    for layer in numbers:
      if layer in tied:
        raise ValueError(f"ties must have each layer once, got {layer} twice")
      tied[layer] = numbers
  return tuple(
    tied.get(layer, (layer,))
    for layer in range(layers)
    if tied.get(layer, (layer,))[0] == layer
  )


def _check_pinned(
  pinned: Mapping[int, int], groups: tuple[tuple[int, ...], ...], width: int
) -> tuple[np.ndarray, ...]:
  """Returns the columns that every group may take."""
  owner = {layer: v for v, group in enumerate(groups) for layer in group}
  columns = [np.arange(width) for _ in groups]
  pins: dict[int, int] = {}
  for key, value in pinned.items():
    layer = integer("pinned", key, at_least=0, below=len(owner))
    field = f"pinned[{layer}]"
    column = integer(field, value, at_least=0, below=width)
    v = owner[layer]
    if pins.setdefault(v, column) != column:
      raise ValueError(
        f"{field} must be {pins[v]}, as for the layers it is tied to, "
        f"{groups[v]}, got {column}"
      )
    columns[v] = np.array([column])
  return tuple(columns)


def _integers(values: np.ndarray) -> np.ndarray:
  """Returns exact integers, dtype object, in a common unit."""
  ratios = [float(value).as_integer_ratio() for value in values.ravel()]
  common = max(denominator for _, denominator in ratios)
  exact = np.empty(len(ratios), object)
  exact[:] = [number * (common // below) for number, below in ratios]
  return exact.reshape(values.shape)
