"""How assignments are scored, and the network that searches by gradient train.

An assignment is scored by inference on the network as it is, never retrained.
Every score is recorded, in memory and on disk, so that a search that was killed
starts again from its seed and finds all scores that it had.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dr_jax.nn import Functional
from dr_jax.runtime import files
from dr_jax.runtime.schema import COUNT, NUMBER, Where
from dr_jax.search.problem import Index, Trial
from dr_jax.train import InterruptedRun, Score


def _is_trial(values):
  if len(values) != 4 or not isinstance(values[0], list):
    return False
  positions, *scores = values
  return all(map(COUNT.holds, positions)) and all(map(NUMBER.holds, scores))


_TRIAL = Where([object], _is_trial, "[positions, accuracy, loss, seconds]")


class Evaluator:
  """Scores assignments, each only once, and records them in a file.

  Attributes:
    path: JSON lines, one trial each; None for memory alone. A file belongs to
      one network and one set of examples.
  """

  def __init__(
    self,
    score: Callable[[np.ndarray], Score],
    *,
    path: str | os.PathLike | None = None,
    interrupted: Callable[[], str | None] = lambda: None,
  ):
    """Reads the trials of earlier runs.

    Args:
      score: int32 [L] positions in the candidate bit-widths -> Score; by
        inference, and never on the test set.
      path: file of the trials; a torn last line is cut off.
      interrupted: returns the name of a signal that asks to stop, else None.

    Raises:
      OSError: if the file cannot be opened, or is a link.
      ValueError: if it holds anything but trials; it is unchanged then.
    """
    self.path = None if path is None else files.expand(path)
    self._score, self._interrupted = score, interrupted
    self._known: dict[Index, Trial] = {}
    if self.path is not None and os.path.lexists(self.path):
      file, known = files.open_lines(self.path, _TRIAL)
      file.close()
      for index, accuracy, loss, seconds in known:
        key = tuple(index)
        self._known[key] = Trial(key, accuracy, loss, seconds)

  def __call__(self, index: Sequence[int] | np.ndarray) -> Trial:
    """Returns the trial of an assignment, scored now or read back.

    Raises:
      train.InterruptedRun: if a signal asked to stop.
    """
    if name := self._interrupted():
      raise InterruptedRun(f"search: stopped by {name}", name)
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
    if self.path is not None:
      with files.open_append(self.path) as file:
        file.write(json.dumps(trial) + "\n")


class SuperNet(NamedTuple):
  """A network that searches by gradient train, in a copy.

  Attributes:
    network: its function; layers and bits as in the problem.
    params, batch_stats: its trained arrays.
    batches: training batches by step, as `data.batches` returns them.
    directory: where a search keeps its checkpoints; None for none.
    interrupted: returns the name of a signal that asks to stop, else None.
  """

  network: Functional
  params: Any
  batch_stats: Any
  batches: Any
  directory: pathlib.Path | None = None
  interrupted: Callable[[], str | None] = lambda: None
