"""The training loop: batches in, checkpoints and metrics out.

The loop runs a few steps ahead of the device and looks at losses only when
they are there, so that neither logging nor checking makes a step wait. Nor does
a checkpoint: the device copies the state and continues, and the copy is written
once every loss up to it was found finite.

A call makes one step, or `steps_per_call` of them where none but the last is
followed by a checkpoint, a validation, or the end: which calls follow a step
does not depend on how the run came there.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from dr_jax.checkpoint.checkpoints import Checkpoints
from dr_jax.checkpoint.snapshot import Snapshot
from dr_jax.runtime.metrics import MetricsWriter
from dr_jax.runtime.progress import Progress
from dr_jax.train.calls import grouped
from dr_jax.train.measured import LOGGED
from dr_jax.train.schedules import LoggedStep
from dr_jax.train.state import TrainState

# Names of numbers that it writes of a step that is logged.
NAMES = ("loss", *LOGGED, "examples_per_second")

# How many steps the loop may be ahead of the oldest loss that it has seen; of
# calls that make more, one. Batches of all these are on the device.
_AHEAD = 4


class NonFiniteError(RuntimeError):
  """A loss or a parameter is NaN or infinite; training stops."""

  exit_code = 1


class InterruptedRun(RuntimeError):
  """A signal asked the run to stop; its state is in the last checkpoint.

  Attributes:
    signal: its number.
  """

  def __init__(self, message: str, name: str):
    super().__init__(message)
    self.signal = int(signal.Signals[name])


class Validation(Protocol):
  """Scores the state now and then, each time after its checkpoint."""

  def is_due(self, step: int) -> bool:
    """Whether the state after `step` steps is to be scored."""
    ...

  def resume(self, step: int, metrics: MetricsWriter | None) -> bool:
    """Returns whether the state that a run resumes from has no score yet."""
    ...

  def score(
    self, step: int, state: TrainState, metrics: MetricsWriter | None
  ) -> str:
    """Scores a state and writes that; returns what progress shows of it."""
    ...


@dataclasses.dataclass(frozen=True)
class Loop:
  """What a training run consists of, apart from its state.

  Attributes:
    stage: name of the stage, for messages and metrics.
    steps: step number at which the run ends.
    labels: bit-width of each loss, or a word (see `train.sampling`); None for
      the float network.
    step: as `logged_step` of `train.make_trainer`; what it logs goes to
      `metrics`, every `log_every` steps.
    steps_per_call: how many steps it makes in a call at most; with 1 it gets no
      tuples of batches.
    batches: `[step]` -> batch of numpy arrays; where it has `stream(step)`, an
      iterator from that step on, the loop takes and closes that.
    checkpoints: where states go, or None.
    metrics: where numbers go, or None.
    checkpoint_every: steps between checkpoints; the last step always has one.
    log_every: steps between entries in `metrics`.
    interrupted: returns the name of a signal that asks to stop, else None.
    put: sends a batch to the devices, without waiting for it.
    show_progress: whether to show how far the run is.
    validation: what scores states, or None.
  """

  stage: str
  steps: int
  labels: tuple[int | str | None, ...]
  step: LoggedStep
  batches: Any
  steps_per_call: int = 1
  checkpoints: Checkpoints | None = None
  metrics: MetricsWriter | None = None
  checkpoint_every: int = 100
  log_every: int = 10
  interrupted: Callable[[], str | None] = lambda: None
  put: Callable[[Any], Any] = jax.device_put
  show_progress: bool = True
  validation: Validation | None = None

  def run(self, state: TrainState) -> TrainState:
    """Trains from `state` (its step number says where) to the last step.

    Returns:
      The state at `steps`. It is also the latest checkpoint.

    Raises:
      NonFiniteError: naming stage, step and bit-width; the last checkpoint is
        from before.
      InterruptedRun: after saving a checkpoint of the step reached.
    """
    start = int(state.step)
    watch = _Losses(self, start)
    console = None if self.show_progress else rich.console.Console(quiet=True)
    with (
      contextlib.closing(_stream(self.batches, start)) as stream,
      Progress(
        *(self.stage, self.steps),
        start=start,
        labels=self.labels,
        console=console,
      ) as progress,
    ):
      if start:
        text = f"{self.stage}  resumes from step {start} of {self.steps}"
        progress.print(text)
      scorer = self.validation
      if scorer is not None and scorer.resume(start, self.metrics):
        # The run was stopped between the checkpoint and the score.
        progress.note(scorer.score(start, state, self.metrics))
      wanted = itertools.islice(stream, self.steps - start)
      ready = _ahead(wanted, self.put, self.steps_per_call)
      step = start
      try:
        for group in grouped(ready, self._call_size, start):
          batch: Any = group if len(group) > 1 else group[0]
          state, losses, logged = self.step(state, batch)
          if step == start:
            # Compiles what copies need, while steps are compiled anyway.
            _Copy.of(
              step + len(group), state, saves=self.checkpoints is not None
            )
          step += len(group)
          stopped = self.interrupted()
          last = step == self.steps
          due = scorer is not None and scorer.is_due(step)
          ends = last or bool(stopped) or due
          if ends or step % self.checkpoint_every == 0:
            watch.copy(step, state, progress)
          examples = [len(batch["label"]) for batch in group]
          watch.add(_Call(step, losses, logged, examples), progress)
          if ends:
            watch.drain(progress)
            if self.checkpoints is not None:
              self.checkpoints.wait()
          if stopped and not last:
            raise InterruptedRun(
              f"{self.stage}: stopped by {stopped} after step {step} of "
              f"{self.steps}; saved",
              stopped,
            )
          if due and scorer is not None:
            with watch.paused():
              progress.note(scorer.score(step, state, self.metrics))
      except NonFiniteError:
        raise
      except Exception:
        # A copy may wait to be saved. Others may not have come as far.
        if jax.process_count() == 1:
          with contextlib.suppress(Exception):
            watch.drain(progress)
        raise
    return state

  def _call_size(self, step):
    """How many steps the call makes that begins after `step` steps."""
    count, scorer = self.steps_per_call, self.validation
    within = range(step + 1, step + count)
    undisturbed = step + count <= self.steps and not any(
      s % self.checkpoint_every == 0
      or (scorer is not None and scorer.is_due(s))
      for s in within
    )
    return count if undisturbed else 1

  def _kept(self):
    if self.checkpoints is None:
      return "no checkpoint is kept"
    self.checkpoints.wait()
    step = self.checkpoints.latest()
    if step is None:
      return "there is no earlier checkpoint"
    return f"the checkpoint of step {step} is kept"


def _stream(batches, start):
  if hasattr(batches, "stream"):
    return batches.stream(start)
  return (batches[step] for step in itertools.count(start))


def _ahead(batches, put, count):
  """Yields batches on the device, `count` further ones being on their way."""
  waiting = collections.deque()
  for batch in batches:
    waiting.append(put(batch))
    if len(waiting) > count:
      yield waiting.popleft()
  yield from waiting


class _Copy(NamedTuple):
  """What is to be saved.

  Attributes:
    step: how many steps it has seen.
    finite: bool [], on the device: whether everything in it is.
    snapshot: None if there is nowhere to save it.
  """

  step: int
  finite: jax.Array
  snapshot: Snapshot | None

  @classmethod
  def of(cls, step, state, *, saves):
    """Has a state examined, and copied if it is to be saved."""
    finite = _all_finite(state.params, state.batch_stats, state.opt_state)
    return cls(step, finite, Snapshot(state) if saves else None)


class _Call(NamedTuple):
  """What the steps of a call return.

  Attributes:
    step: how many steps there have been after it.
    losses: [passes], or [steps, passes] of several.
    logged: {name: as losses}.
    examples: of each step.
  """

  step: int
  losses: jax.Array
  logged: dict[str, jax.Array]
  examples: list[int]

  def rows(self):
    """Yields step, losses [passes], logged, examples; waits for them."""
    if len(self.examples) == 1:
      # What is not logged stays on the device.
      yield self.step, np.asarray(self.losses), self.logged, self.examples[0]
      return
    columns = {k: np.asarray(v) for k, v in self.logged.items()}
    first = self.step - len(self.examples) + 1
    for row, losses in enumerate(np.asarray(self.losses)):
      logged = {name: column[row] for name, column in columns.items()}
      yield first + row, losses, logged, self.examples[row]


class _Losses:
  """Losses on their way from the device, and the copy that waits for them.

  Checks, averages and reports them; saves the copy when they are all seen.
  """

  def __init__(self, loop: Loop, start: int):
    self._loop = loop
    self._pending: collections.deque = collections.deque()
    self._copy: _Copy | None = None
    self._sum = np.zeros(len(loop.labels))
    self._count, self._examples, self._seconds = 0, 0, 0.0
    self._since = time.monotonic()
    if loop.metrics is not None:
      # A checkpoint between two entries: the next one is the mean of all steps
      # since the last, also of those before the checkpoint.
      counts = loop.metrics.values(loop.stage, start, "losses")
      sums = loop.metrics.values(loop.stage, start, "loss_sum")
      count = counts.get(None, 0)
      # Nobody vouches for what a file says.
      if 1 <= count <= start and set(loop.labels) <= set(sums):
        self._count = int(count)
        self._sum[:] = [sums[label] for label in loop.labels]

  def add(self, call, progress):
    self._pending.append(call)
    if len(self._pending) > max(_AHEAD // self._loop.steps_per_call, 1):
      self._take(progress)

  def copy(self, step, state, progress):
    """Takes a copy, which is saved when the losses up to it have been seen."""
    if self._copy is not None:
      # One copy at a time.
      self.drain(progress)
    saves = self._loop.checkpoints is not None
    self._copy = _Copy.of(step, state, saves=saves)

  @contextlib.contextmanager
  def paused(self):
    """Leaves what is done meanwhile out of the speed."""
    started = time.monotonic()
    yield
    self._since += time.monotonic() - started

  def drain(self, progress):
    while self._pending:
      self._take(progress)

  def _take(self, progress):
    call = self._pending.popleft()
    rows = list(call.rows())
    now = time.monotonic()
    # Losses of a call are there at once, however long each step took.
    seconds, self._since = (now - self._since) / len(rows), now
    for step, losses, logged, examples in rows:
      self._seconds += seconds
      self._examples += examples
      self._see(step, losses, logged)
    examples, losses = sum(call.examples), rows[-1][1]
    progress.update(call.step, examples=examples, losses=losses)

  def _see(self, step, losses, logged):
    for label, loss in zip(self._loop.labels, losses, strict=True):
      if not np.isfinite(loss):
        at = "float" if label is None else f"{label} bits"
        raise NonFiniteError(
          f"{self._loop.stage}: loss is {loss} at step {step}, {at}; "
          f"{self._loop._kept()}"
        )
    self._sum += losses
    self._count += 1
    if step % self._loop.log_every == 0 or step == self._loop.steps:
      self._log(step, logged)
    if self._copy is not None and self._copy.step == step:
      self._log_open_window(step)
      self._save(self._copy)
      self._copy = None

  def _save(self, copy):
    if not copy.finite:
      raise NonFiniteError(
        f"{self._loop.stage}: a parameter or its optimizer is NaN or infinite "
        f"after step {copy.step}; {self._loop._kept()}"
      )
    if copy.snapshot is not None and self._loop.checkpoints is not None:
      self._loop.checkpoints.save(copy.step, copy.snapshot)

  def _log_open_window(self, step):
    """Writes down what the next entry of losses has to know of."""
    metrics, stage = self._loop.metrics, self._loop.stage
    resumes = self._loop.checkpoints is not None
    if metrics is not None and resumes and self._count:
      for label, total in zip(self._loop.labels, self._sum, strict=True):
        metrics.write(stage, step, {"loss_sum": total}, bits=label)
      metrics.write(stage, step, {"losses": self._count})

  def _log(self, step, logged):
    if self._loop.metrics is not None:
      numbers = {"loss": self._sum / self._count, **logged}
      columns = {name: np.asarray(column) for name, column in numbers.items()}
      for row, label in enumerate(self._loop.labels):
        values = {name: column[row] for name, column in columns.items()}
        self._loop.metrics.write(self._loop.stage, step, values, bits=label)
      speed = self._examples / max(self._seconds, 1e-9)
      self._loop.metrics.write(
        self._loop.stage, step, {"examples_per_second": speed}
      )
    self._sum[:] = 0
    self._count, self._examples, self._seconds = 0, 0, 0.0


@jax.jit
def _finite(leaves):
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _all_finite(*trees):
  leaves = [
    leaf
    for leaf in jax.tree.leaves(trees)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  return _finite(leaves)
