"""The problem of a search: layers, bit-widths, costs, and what is fixed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dr_jax import allocate
from dr_jax.nn import LayerTable

Index = tuple[int, ...]


class Trial(NamedTuple):
  """One assignment and its score.

  Attributes:
    index: position in the candidate bit-widths, per layer.
    accuracy: percent of the examples that assignments are scored on.
    loss: mean cross-entropy on them.
    seconds: duration of the evaluation.
  """

  index: Index
  accuracy: float
  loss: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Problem:
  """A network whose layers are to be given bit-widths.

  Attributes:
    table: the quantized layers, in call order.
    bits: candidate bit-widths, highest first.
    costs: {name: int64 [L, B]}, what each layer costs at each bit-width; a
      measured latency may also rise with fewer bits.
    ties: groups of layer numbers that share a bit-width.
    pinned: {layer number: position} of layers that are not searched.
    metric: "loss" or "accuracy", by which assignments are compared; the other
      one breaks ties.

  >>> from dr_jax import nn, search
  >>> table = nn.LayerTable(
  ...   nn.LayerRow(name, "linear", (4, 4), 1, 16, 16, None, 8) for name in "ab"
  ... )
  >>> problem = search.Problem(
  ...   table=table, bits=(8, 4), costs={"bits": np.array([[8, 4], [8, 4]])}
  ... )
  >>> problem.cost((0, 1)), problem.fits((0, 1), {"bits": 11})
  ({'bits': 12}, False)
  """

  table: LayerTable
  bits: tuple[int, ...]
  costs: Mapping[str, np.ndarray]
  ties: tuple[tuple[int, ...], ...] = ()
  pinned: Mapping[int, int] = dataclasses.field(default_factory=dict)
  metric: str = "loss"

  def __post_init__(self):
    if list(self.bits) != sorted(self.bits, reverse=True):
      raise ValueError(f"bits must be highest first, got {self.bits}")
    for name, table in self.costs.items():
      self.check_table(f"costs[{name!r}]", table)
    if self.metric not in ("loss", "accuracy"):
      raise ValueError(f"metric must be loss or accuracy, got {self.metric!r}")

  def check_table(self, name: str, table: np.ndarray) -> None:
    """Raises ValueError unless a table has the shape [L, B]."""
    shape = (len(self.table), len(self.bits))
    if np.shape(table) != shape:
      raise ValueError(
        f"{name} must have shape {shape}, layers by candidate bit-widths, got "
        f"{np.shape(table)}"
      )

  @property
  def layers(self) -> tuple[str, ...]:
    """Names of the layers."""
    return tuple(row.name for row in self.table)

  def cost(self, index: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Returns what an assignment costs, exactly, by cost."""
    return {name: self._total(name, index) for name in self.costs}

  def fits(
    self, index: Sequence[int] | np.ndarray, budgets: Mapping[str, int]
  ) -> bool:
    """Returns whether an assignment is within every budget."""
    return all(
      self._total(name, index) <= limit for name, limit in budgets.items()
    )

  def _total(self, name, index):
    rows = zip(self.costs[name], index, strict=True)
    return sum(int(row[position]) for row, position in rows)

  def groups(self) -> list[tuple[int, ...]]:
    """Returns the layers that may change, in groups that change together."""
    tied = {layer: tuple(group) for group in self.ties for layer in group}
    fixed = {layer for pin in self.pinned for layer in tied.get(pin, (pin,))}
    seen, groups = set(fixed), []
    for layer in range(len(self.table)):
      if layer not in seen:
        groups.append(tied.get(layer, (layer,)))
        seen.update(groups[-1])
    return groups

  def start(self, position: int) -> np.ndarray:
    """Returns int32 [L]: free layers at one position, pinned ones at theirs."""
    index = np.full(len(self.table), position, np.int32)
    tied = {layer: tuple(group) for group in self.ties for layer in group}
    for layer, pin in self.pinned.items():
      index[list(tied.get(layer, (layer,)))] = pin
    return index

  def check(self, budgets: Mapping[str, int]) -> None:
    """Checks that the budgets are of known costs and feasible.

    Raises:
      ValueError: for an unknown name, or a budget that is not positive.
      allocate.Infeasible: naming the smallest budget that is feasible.
    """
    self.solve(np.zeros((len(self.table), len(self.bits))), budgets)

  def solve(
    self,
    objective: np.ndarray,
    budgets: Mapping[str, int],
    *,
    pinned: Mapping[int, int] | None = None,
  ) -> Index:
    """Returns the assignment of minimum objective [L, B] within the budgets.

    Args:
      objective, budgets: as for `allocate.solve`.
      pinned: layers to pin besides the problem's.

    Raises:
      As `allocate.solve`.
    """
    unknown = set(budgets) - set(self.costs)
    if unknown or not budgets:
      raise ValueError(
        f"budgets must be of the costs {', '.join(self.costs)}, got "
        f"{sorted(unknown) or 'none'}"
      )
    solution = allocate.solve(
      objective,
      {name: self.costs[name] for name in budgets},
      dict(budgets),
      ties=self.ties,
      pinned={**self.pinned, **(pinned or {})},
    )
    return tuple(map(int, solution.index))

  def rank(self, trial: Trial) -> tuple[float, float]:
    """Sort key of trials: the best comes first, NaN last."""
    loss, error = trial.loss, -trial.accuracy
    keys = (loss, error) if self.metric == "loss" else (error, loss)
    first, second = (math.inf if math.isnan(key) else key for key in keys)
    return first, second
