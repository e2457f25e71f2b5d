"""Validation: scores of held-out examples while a phase trains, best state.

A validation comes after the checkpoint of its step. A run that is killed in
between repeats it, so that it ends as if it had not been killed. The order is:
score, save the state if it is the best, write the score.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from dr_jax import checkpoint, nn, train
from dr_jax.checkpoint import Checkpoints
from dr_jax.config import TrainConfig
from dr_jax.pipeline.context import RunContext
from dr_jax.runtime.metrics import MetricsWriter
from dr_jax.runtime.processes import on_first
from dr_jax.runtime.sharding import Layout
from dr_jax.runtime.tasks import TASKS

# In metrics.jsonl, for each bit-width.
NAMES = ("validation_accuracy", "validation_loss")
# The best state, and the one before it: the checkpoint to resume from may be
# of a step between them.
_KEEP = 2


class Best:
  """The best state of a phase so far, in a directory.

  The best one has the least cost, the mean of `Task.cost` over the candidate
  bit-widths in float32; of equal ones it is the later.
  """

  def __init__(
    self, directory: str | os.PathLike, layout: Layout, state: train.TrainState
  ):
    """Opens a directory, creating it if necessary; all processes must.

    Args:
      directory: of the states.
      layout: where their arrays live.
      state: one of the same structure.
    """
    self._layout = layout
    self._like = self._kept(state, math.inf)
    self._checkpoints = Checkpoints(directory, keep=_KEEP)
    self._cost = math.inf

  def resume(self, step: int) -> None:
    """Forgets the states of `step` and later ones."""
    self._checkpoints.delete_from(step)
    if self.step is not None:
      restored = self._checkpoints.restore(like=self._like)
      self._cost = float(restored["cost"])

  @property
  def step(self) -> int | None:
    """The step of the best state, or None if there is none."""
    return self._checkpoints.latest()

  def offer(self, step: int, cost: float, state: train.TrainState) -> None:
    """Saves a state if none is better; returns when it is on disk."""
    cost = float(np.float32(cost))
    # No NaN is better than anything.
    if cost <= self._cost:
      kept = self._kept(state, cost)
      self._checkpoints.save(step, kept, blocking=True)
      self._cost = cost

  def applied_to(self, state: train.TrainState) -> train.TrainState:
    """Returns a state with the arrays of the best one, if there is one."""
    if self.step is None:
      return state
    best = self._checkpoints.restore(like=self._like)
    return state._replace(
      params=best["params"], batch_stats=best["batch_stats"]
    )

  def close(self) -> None:
    """Releases the directory."""
    self._checkpoints.close()

  def _kept(self, state, cost):
    value = np.asarray(cost, np.float32)
    array = jax.make_array_from_callback(
      (), self._layout.replicated, lambda index: value[index]
    )
    return {
      "params": state.params,
      "batch_stats": state.batch_stats,
      "cost": array,
    }


class Setting(NamedTuple):
  """What a phase validates, and when.

  Attributes:
    stage: name of the phase.
    bits: candidate bit-widths, (None,) for a float network.
    examples: of training between two scores.
    batch_size: examples of a step.
    keep_best: whether the best state is kept.
  """

  stage: str
  bits: Sequence[int | None]
  examples: int
  batch_size: int
  keep_best: bool


def setting(
  run: RunContext, stage: str, bits: Sequence[int | None], recipe: TrainConfig
) -> Setting | None:
  """Returns what a recipe validates, None for nothing."""
  if not recipe.validation_every:
    return None
  examples = recipe.validation_every * len(run.data.train)
  batch_size = run.config.data.batch_size
  return Setting(stage, bits, examples, batch_size, recipe.keep_best)


def disk_bytes(recipe: TrainConfig, state: train.TrainState) -> int:
  """Returns how many bytes the best states take on disk at most."""
  if not recipe.keep_best:
    return 0
  arrays = {"params": state.params, "batch_stats": state.batch_stats}
  return checkpoint.disk_bytes(arrays, keep=_KEEP)


@contextlib.contextmanager
def opened(
  run: RunContext,
  setting: Setting | None,
  model: nnx.Module,
  steps: int,
  layout: Layout,
  state: train.TrainState,
) -> Iterator[Validation | None]:
  """Yields what validates a phase, None for nothing; all processes must.

  Args:
    run: the run, with held-out examples.
    setting: what is scored, and when.
    model: that is trained.
    steps: of the phase; the last state is always scored.
    layout: where its state lives.
    state: one of the same structure.
  """
  if setting is None:
    yield None
    return
  with contextlib.ExitStack() as stack:
    best = None
    if setting.keep_best:
      best = Best(run.workdir.path / setting.stage / "best", layout, state)
      stack.callback(best.close)
    yield Validation(run, setting, model, steps, layout, best)


class Validation:
  """Scores states of a phase; a `train.loop.Validation`.

  One program scores all bit-widths, in the first process alone. It computes
  what training does, in inference mode, and not the deployed form that the
  test set is scored in, so that last bits may differ.
  """

  def __init__(
    self,
    run: RunContext,
    setting: Setting,
    model: nnx.Module,
    steps: int,
    layout: Layout,
    best: Best | None,
  ):
    """Compiles nothing yet; for the arguments see `opened`."""
    self._run, self._setting, self._layout = run, setting, layout
    self._steps, self._best = steps, best
    self._evaluate = train.make_evaluate(nn.functional(model), run.local)

  def is_due(self, step: int) -> bool:
    """Whether the state after `step` steps is to be scored."""
    size, examples = self._setting.batch_size, self._setting.examples
    passed = step * size // examples > (step - 1) * size // examples
    return step > 0 and (passed or step == self._steps)

  def resume(self, step: int, metrics: MetricsWriter | None) -> bool:
    """Forgets best states that a run from this step has not seen.

    Returns:
      Whether the state of this very step is to be scored and has no score.
    """
    stage, bits = self._setting.stage, self._setting.bits

    def is_missing():
      written = metrics.values(stage, step, NAMES[-1]) if metrics else {}
      return set(written) != set(bits)

    missing = self.is_due(step) and on_first(is_missing)
    if self._best is not None:
      # That of this step is saved again, if it has no score.
      self._best.resume(step + 1)
    return missing

  def score(
    self, step: int, state: train.TrainState, metrics: MetricsWriter | None
  ) -> str:
    """Scores a state, keeps it if it is the best, and writes the scores."""
    arrays = train.gather(self._layout, (state.params, state.batch_stats))
    scores = on_first(lambda: self._scores(*arrays))
    task = TASKS[self._run.data.task]
    if self._best is not None:
      cost = statistics.fmean(map(task.cost, scores))
      self._best.offer(step, cost, state)
    if metrics is not None:
      self._write(step, scores, metrics)
    text = f"validation {task.metric} {'/'.join(map(task.shown, scores))}"
    if self._best is not None and self._best.step is not None:
      text += f", best at step {self._best.step}"
    return text

  def best(self, state: train.TrainState) -> train.TrainState:
    """Returns the best state where that is kept, else the one given."""
    return state if self._best is None else self._best.applied_to(state)

  def _scores(self, params, batch_stats):
    found = []
    for index in range(len(self._setting.bits)):
      batches = self._run.epoch(self._run.held_out)
      score = self._evaluate(params, batch_stats, index, batches)
      found.append(score._asdict())
    return found

  def _write(self, step, scores, metrics):
    stage, bits = self._setting.stage, self._setting.bits
    # A process that was killed here has written some of them.
    metrics.drop(stage, step, NAMES)
    for b, score in zip(bits, scores, strict=True):
      values = {f"validation_{name}": value for name, value in score.items()}
      metrics.write(stage, step, values, bits=b)
