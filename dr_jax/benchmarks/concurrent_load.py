"""Seconds of a training step under concurrent load.

What `python -m dr_jax.benchmarks.overlap` prints.
"""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dr_jax import train
from dr_jax.benchmarks import images, network
from dr_jax.benchmarks.rows import Rows, prepared, turns
from dr_jax.checkpoint.checkpoints import Checkpoints
from dr_jax.config import TrainConfig
from dr_jax.runtime.metrics import MetricsWriter

# Steps before time counts: compilation, workers that begin.
_WARMUP = 8
_CHECKPOINT_EVERY = 10


class Load(NamedTuple):
  """The load that is concurrent with the steps.

  Attributes:
    name: in the table.
    metrics: whether every loss is written.
    checkpoints: whether every tenth step is saved.
    images: whether batches are decoded, not always the same.
  """

  name: str
  metrics: bool = False
  checkpoints: bool = False
  images: bool = False


KINDS = (
  Load("the loop"),
  Load("and metrics of every step", metrics=True),
  Load("and checkpoints", metrics=True, checkpoints=True),
  Load("and decoding", metrics=True, checkpoints=True, images=True),
)


class Trained:
  """A network that is trained again and again from its first state."""

  def __init__(self, setting: network.Setting, batch_size: int, workers: int):
    """Builds the step.

    Args:
      setting: network and images.
      batch_size: images per step.
      workers: processes that decode them, where they are decoded.
    """
    recipe = TrainConfig(alrs="eta")
    trainer, self._first = network.trainer(setting.quantized(), recipe)
    self.step = trainer.logged_step
    self._bits, self._batch = setting.bits, setting.batch(batch_size)
    self._size, self._workers = setting.size, workers

  def alone(self, steps: int) -> float:
    """Seconds of a step, one called after the other."""
    state, batch = self._start(), jax.device_put(self._batch)
    for _ in range(_WARMUP):
      state, *_ = self.step(state, batch)
    jax.block_until_ready(state)
    started = time.perf_counter()
    for _ in range(steps):
      state, *_ = self.step(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - started) / steps

  def looped(self, steps: int, load: Load, root: pathlib.Path) -> float:
    """Seconds of a step in the training loop.

    Args:
      steps: how many are timed.
      load: what runs concurrently.
      root: a directory of images, see `images.write`.
    """
    times: list[float] = []
    until = _WARMUP + steps
    batches: Any = [self._batch] * until
    if load.images:
      batches = images.batches(
        root,
        batch_size=len(self._batch["label"]),
        image_size=self._size,
        workers=self._workers,
      )
    with contextlib.ExitStack() as stack:
      written = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
      metrics, checkpoints = None, None
      if load.metrics:
        metrics = stack.enter_context(MetricsWriter(written / "metrics.jsonl"))
      if load.checkpoints:
        checkpoints = stack.enter_context(Checkpoints(written / "checkpoints"))
      train.Loop(
        stage="overlap",
        steps=until,
        labels=self._bits,
        step=self.step,
        batches=batches,
        checkpoints=checkpoints,
        metrics=metrics,
        checkpoint_every=_CHECKPOINT_EVERY,
        log_every=1,
        # Asked once a step, after it was sent to the device; what the last
        # step alone does, a save that is waited for, comes later.
        interrupted=lambda: times.append(time.perf_counter()),
        show_progress=False,
      ).run(self._start())
    return (times[-1] - times[_WARMUP - 1]) / steps

  def _start(self):
    # Steps donate what they are given.
    return jax.tree.map(lambda leaf: leaf.copy(), self._first)


def measure(
  trained: Trained,
  root: pathlib.Path,
  kinds: Sequence[Load],
  *,
  steps: int,
  rounds: int,
) -> dict[str, list[float]]:
  """Seconds of a step of each kind, one for each round; kinds take turns."""
  runs: dict[str, Callable[[], float]] = {
    "steps in a row": lambda: trained.alone(steps)
  }
  for kind in kinds:
    runs[kind.name] = lambda kind=kind: trained.looped(steps, kind, root)
  # Compiles what the loop needs besides the step.
  prepared("the loop", lambda: trained.looped(1, kinds[-1], root))
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in turns(rounds):
    for name, run in runs.items():
      seconds[name].append(run())
  return seconds


def print_table(seconds: dict[str, list[float]], title: str) -> None:
  """Prints medians, and medians of the ratios within a round."""
  rows = Rows(title, ("under load of", "ms/step", "of steps in a row"))
  alone = next(iter(seconds.values()))
  for name, row in seconds.items():
    ratios = [one / other for one, other in zip(row, alone, strict=True)]
    rows.add(
      name,
      f"{statistics.median(row) * 1e3:.1f}",
      f"{statistics.median(ratios):.2f}",
    )
  rows.end()
