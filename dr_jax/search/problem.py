"""What a search is given and what it returns, the same for all searches.

A search is a function

    search(problem, budgets, *, seed=0, ...) -> Result

It never retrains what it is scored on: an assignment is scored by inference, on
examples of which the test set has none. Every score is remembered, in memory
and on disk, so that a search that was killed runs again from its seed and finds
all scores that it already paid for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dr_jax import allocate
from dr_jax.nn import Functional, LayerTable
from dr_jax.train import InterruptedRun, Score

Index = tuple[int, ...]


class Trial(NamedTuple):
  """One assignment and what it scored.

  Attributes:
    index: position in the candidate bit-widths, per layer.
    accuracy: percent of the examples that searches look at.
    loss: mean cross-entropy on them.
    seconds: what the evaluation took when it was made.
  """

  index: Index
  accuracy: float
  loss: float
  seconds: float


class Evaluator:
  """Scores assignments, each only once, and remembers them in a file.

  Attributes:
    path: JSON lines, one trial each; None for memory alone. It belongs to one
      network and one set of examples: a new one needs another file.
  """

  def __init__(
    self,
    score: Callable[[np.ndarray], Score],
    *,
    path: str | os.PathLike | None = None,
  ):
    """Reads what earlier runs scored.

    Args:
      score: int32 [L] positions in the candidate bit-widths -> Score.
      path: where trials are kept; a torn last line is cut off.

    Raises:
      ValueError: if the file holds something else than trials.
    """
    self.path = None if path is None else pathlib.Path(path)
    self._score = score
    self._known: dict[Index, Trial] = {}
    if self.path is not None and self.path.exists():
      self._read()

  def __call__(self, index: Sequence[int] | np.ndarray) -> Trial:
    """Returns the trial of an assignment, scored now or remembered."""
    key = tuple(map(int, index))
    if key not in self._known:
      started = time.perf_counter()
      accuracy, loss = self._score(np.asarray(key, np.int32))
      seconds = time.perf_counter() - started
      trial = Trial(key, float(accuracy), float(loss), seconds)
      self._known[key] = trial
      self._write(trial)
    return self._known[key]

  def _write(self, trial):
    if self.path is None:
      return
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with self.path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(trial) + "\n")

  def _read(self):
    whole = self.path.read_bytes().rfind(b"\n") + 1
    os.truncate(self.path, whole)
    for line in self.path.read_text(encoding="utf-8").splitlines():
      try:
        index, accuracy, loss, seconds = json.loads(line)
        key = tuple(map(int, index))
      except (ValueError, TypeError):
        raise ValueError(
          f"{self.path} must be a file that an Evaluator wrote, but "
          f"{line[:40]!r} is not a trial"
        ) from None
      self._known[key] = Trial(key, accuracy, loss, seconds)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A network whose layers are to be given bit-widths.

  Attributes:
    table: the quantized layers, in call order.
    bits: candidate bit-widths, highest first.
    costs: {name: int64 [L, B]}, what each layer costs at each bit-width; a
      measured latency may also rise with fewer bits.
    evaluate: scores an assignment by inference; never on the test set. None
      for a problem that is only checked.
    sensitivity: {objective: float [L, B]}, to be minimized; see
      `search.hessian_ilp`.
    ties: groups of layer numbers that share a bit-width.
    pinned: {layer number: position} of layers that are not searched.
    metric: "loss" or "accuracy", what decides between assignments; the other
      one decides ties.
    network, state, batches: for searches by gradient: the SuperNet, its
      (params, batch_stats), and training batches by step.
    directory: where a search by gradient keeps its checkpoints, or None.
    interrupted: names a signal that asks to stop, else None, as `train.Loop`'s.
  """

  table: LayerTable
  bits: tuple[int, ...]
  costs: Mapping[str, np.ndarray]
  evaluate: Evaluator | None
  sensitivity: Mapping[str, np.ndarray] = dataclasses.field(
    default_factory=dict
  )
  ties: tuple[tuple[int, ...], ...] = ()
  pinned: Mapping[int, int] = dataclasses.field(default_factory=dict)
  metric: str = "loss"
  network: Functional | None = None
  state: tuple[Any, Any] | None = None
  batches: Any = None
  directory: pathlib.Path | None = None
  interrupted: Callable[[], str | None] = lambda: None

  def __post_init__(self):
    if list(self.bits) != sorted(self.bits, reverse=True):
      raise ValueError(f"bits must be highest first, got {self.bits}")
    shape = (len(self.table), len(self.bits))
    for group in ("costs", "sensitivity"):
      for name, table in getattr(self, group).items():
        if np.shape(table) != shape:
          raise ValueError(
            f"{group}[{name!r}] must have shape {shape}, layers by candidate "
            f"bit-widths, got {np.shape(table)}"
          )
    if self.metric not in ("loss", "accuracy"):
      raise ValueError(f"metric must be loss or accuracy, got {self.metric!r}")

  @property
  def layers(self) -> tuple[str, ...]:
    """Names of the layers."""
    return tuple(row.name for row in self.table)

  def cost(self, index: Sequence[int] | np.ndarray) -> dict[str, int]:
    """What an assignment costs, exact."""
    return {name: self._total(name, index) for name in self.costs}

  def fits(
    self, index: Sequence[int] | np.ndarray, budgets: Mapping[str, int]
  ) -> bool:
    """Whether an assignment keeps every budget."""
    return all(
      self._total(name, index) <= limit for name, limit in budgets.items()
    )

  def _total(self, name, index):
    rows = zip(self.costs[name], index, strict=True)
    return sum(int(row[position]) for row, position in rows)

  def groups(self) -> list[tuple[int, ...]]:
    """Layers that are free to change, as groups that change together."""
    tied = {layer: tuple(group) for group in self.ties for layer in group}
    fixed = {layer for pin in self.pinned for layer in tied.get(pin, (pin,))}
    seen, groups = set(fixed), []
    for layer in range(len(self.table)):
      if layer not in seen:
        groups.append(tied.get(layer, (layer,)))
        seen.update(groups[-1])
    return groups

  def start(self, position: int) -> np.ndarray:
    """The assignment with all free layers at one position, int32 [L]."""
    index = np.full(len(self.table), position, np.int32)
    tied = {layer: tuple(group) for group in self.ties for layer in group}
    for layer, pin in self.pinned.items():
      index[list(tied.get(layer, (layer,)))] = pin
    return index

  def check(self, budgets: Mapping[str, int]) -> None:
    """Raises unless the budgets are known costs and can be kept.

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
    """The assignment with the least objective [L, B] under the budgets.

    Args:
      objective, budgets: as for `allocate.solve`.
      pinned: layers to hold, besides the problem's.

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
    """Sorts trials: the first is the best. NaN comes last."""
    loss, error = trial.loss, -trial.accuracy
    keys = (loss, error) if self.metric == "loss" else (error, loss)
    first, second = (math.inf if math.isnan(key) else key for key in keys)
    return first, second


class Result(NamedTuple):
  """What a search found under its budgets.

  Attributes:
    allocation: layer name -> bits.
    accuracy, loss: of the examples that the search looked at.
    cost: {name: what the allocation costs}, of every known cost.
    evaluations: number of different assignments that were scored.
    seconds: what the search took beyond the evaluations.
    evaluation_seconds: what the evaluations took, remembered ones included.
    trials: all assignments that were scored, in order.
  """

  allocation: allocate.Allocation
  accuracy: float
  loss: float
  cost: dict[str, int]
  evaluations: int
  seconds: float
  evaluation_seconds: float
  trials: tuple[Trial, ...]


class Ledger:
  """What one search spends: its trials and its time."""

  def __init__(self, problem: Problem, budgets: Mapping[str, int]):
    """Starts the clock.

    Raises:
      As `Problem.check`.
    """
    self._started = time.perf_counter()
    self._waited = 0.0
    self._problem, self._budgets = problem, dict(budgets)
    self._trials: dict[Index, Trial] = {}
    problem.check(budgets)

  def __iter__(self) -> Iterator[Trial]:
    return iter(self._trials.values())

  def __call__(self, index: Sequence[int] | np.ndarray) -> Trial:
    """Scores an assignment; one that this search had before costs nothing.

    Raises:
      train.InterruptedRun: if a signal asked to stop.
    """
    if name := self._problem.interrupted():
      raise InterruptedRun(f"search: stopped by {name}", name)
    key = tuple(map(int, index))
    if key not in self._trials:
      before = time.perf_counter()
      self._trials[key] = self._problem.evaluate(key)
      self._waited += time.perf_counter() - before
    return self._trials[key]

  def result(self, index: Sequence[int] | np.ndarray | None = None) -> Result:
    """Ends the search.

    Args:
      index: what was found; by default the best trial within the budgets.

    Raises:
      ValueError: if that is not within the budgets: an error of the search.
    """
    problem = self._problem
    if index is None:
      fitting = [t for t in self if problem.fits(t.index, self._budgets)]
      if not fitting:
        raise ValueError(
          f"trials: none of {len(self._trials)} keeps {self._budgets}; an "
          "error of the search"
        )
      index = min(fitting, key=problem.rank).index
    trial = self(index)
    if not (math.isfinite(trial.loss) and math.isfinite(trial.accuracy)):
      raise ValueError(
        "scores of the network must be finite, but the best assignment has "
        f"accuracy={trial.accuracy}, loss={trial.loss}"
      )
    cost = problem.cost(trial.index)
    if not problem.fits(trial.index, self._budgets):
      raise ValueError(f"found {cost}, which exceeds {self._budgets}")
    elapsed = time.perf_counter() - self._started
    return Result(
      allocation=allocate.Allocation.from_index(
        problem.layers, problem.bits, trial.index
      ),
      accuracy=trial.accuracy,
      loss=trial.loss,
      cost=cost,
      evaluations=len(self._trials),
      seconds=elapsed - self._waited,
      evaluation_seconds=sum(t.seconds for t in self),
      trials=tuple(self),
    )
