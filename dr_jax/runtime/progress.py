"""How far a stage has come, on the terminal."""

from __future__ import annotations

import collections
import contextlib
import io
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TextIO

import numpy as np
import rich.console
import rich.progress
import rich.text

# Speed and time left come from the last so many seconds.
_WINDOW_S = 30
# Between two updates of a bar.
_BAR_INTERVAL_S = 0.1


# A terminal with fewer columns has no room for a bar beside the numbers.
_NARROW = 80


class Lossy:
  """A text stream whose reader may go away: what it cannot take is dropped.

  A run must not end because nobody reads how far it is.
  """

  def __init__(self, stream: TextIO | None):
    """Wraps a stream; None, as of a closed descriptor, takes nothing."""
    self._stream = stream

  def write(self, text: str) -> int:
    # A stream that was closed raises ValueError.
    with contextlib.suppress(OSError, ValueError):
      if self._stream is not None:
        self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError, ValueError):
      if self._stream is not None:
        self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    if self._stream is None:
      return getattr(io.StringIO(), name)
    return getattr(self._stream, name)


class _Past(NamedTuple):
  """When how many steps were done, and how many examples seen."""

  time: float
  step: int
  examples: int


class Progress:
  """How far a stage has come: a bar on a terminal, else a line now and then.

      pretrain  step 120/400  loss 0.123  5230 examples/s  0:42 left

  With losses at several bit-widths, or a note, these are lines of their own
  next to a bar, and otherwise in the same line:

      multi_precision  step 120/400  loss 0.11/0.134 at 8/4 bits
      validation accuracy % 98.10/97.30  5230 examples/s  0:42 left

  Speed and time left come from the last 30 seconds, and count from the first
  update on, so that compilation does not enter.
  """

  def __init__(
    self,
    stage: str,
    total_steps: int,
    *,
    start: int = 0,
    labels: Sequence[Any] = (),
    interval: float = 5.0,
    console: rich.console.Console | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Describes a stage that is at step `start` of `total_steps`.

    Args:
      stage: name of the stage.
      total_steps: the step at which the stage ends.
      start: the step from which it resumes.
      labels: bit-width of each loss, if there are several.
      interval: seconds between two lines where there is no terminal.
      console: where to print, standard error by default.
      clock: returns the time in seconds.
    """
    stream: Any = Lossy(sys.stderr)
    self._console = console or rich.console.Console(file=stream)
    self._stage, self._total, self._step = stage, total_steps, start
    self._clock, self._examples = clock, 0
    self._losses: Any = None
    self._labels, self._note = labels, ""
    self._history: collections.deque[_Past] = collections.deque()
    self._shown_at, self._is_shown = clock(), True
    self._interval = interval
    self._bar: rich.progress.Progress | None = None
    if self._console.is_terminal and self._console.width >= _NARROW:
      self._interval = _BAR_INTERVAL_S
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TextColumn("{task.fields[status]}", markup=False),
        console=self._console,
      )
      self._task = self._bar.add_task(
        stage, total=total_steps, completed=start, status=self._bar_status()
      )

  def __enter__(self) -> Self:
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if not self._is_shown:
      self._show()
    if self._bar:
      self._bar.stop()

  def update(self, step: int, *, examples: int = 0, losses: Any = None) -> None:
    """Records a finished step, and shows it if it is time to.

    Args:
      step: the number of steps done.
      examples: how many examples were seen since the last update.
      losses: one for each label; a JAX array is waited for only when it is
        shown.
    """
    now = self._clock()
    self._step, self._losses, self._is_shown = step, losses, False
    self._examples += examples
    self._history.append(_Past(now, step, self._examples))
    while self._history[0].time < now - _WINDOW_S and len(self._history) > 2:
      self._history.popleft()
    if now - self._shown_at >= self._interval:
      self._show()

  def note(self, text: str) -> None:
    """Shows a text with the numbers, from now on; at the latest at the end."""
    self._note, self._is_shown = text, False

  def print(self, text: str) -> None:
    """Prints a line, above the bar if there is one."""
    self._console.print(rich.text.Text(text), soft_wrap=True)

  def _show(self) -> None:
    self._shown_at, self._is_shown = self._clock(), True
    if self._bar:
      status = self._bar_status()
      self._bar.update(self._task, completed=self._step, status=status)
    else:
      self.print(f"{self._stage}  {self._line()}")

  def _line(self) -> str:
    step, *speed = self._speed()
    return "  ".join([step, *self._measured(), *speed])

  def _bar_status(self) -> str:
    """One line, or more where one would leave no room for the bar."""
    if len(self._labels) < 2 and not self._note:
      return self._line()
    return "\n".join(["  ".join(self._speed()), *self._measured()])

  def _measured(self) -> list[str]:
    parts = []
    if self._losses is not None:
      losses = np.atleast_1d(np.asarray(self._losses))
      if len(losses) == 1:
        parts.append(f"loss {float(losses[0]):.4g}")
      else:
        shown = "/".join(f"{loss:.3g}" for loss in losses)
        at = "/".join(map(str, self._labels))
        parts.append(f"loss {shown} at {at} bits")
    return parts + [self._note] * bool(self._note)

  def _speed(self) -> list[str]:
    parts = [f"step {self._step}/{self._total}"]
    if len(self._history) > 1:
      first, last = self._history[0], self._history[-1]
      seconds = max(last.time - first.time, 1e-9)
      if last.examples > first.examples:
        parts.append(
          f"{(last.examples - first.examples) / seconds:.0f} examples/s"
        )
      if last.step > first.step:
        steps_left = self._total - last.step
        left = steps_left * seconds / (last.step - first.step)
        parts.append(f"{_minutes(left)} left")
    return parts


def _minutes(seconds: float) -> str:
  """Returns seconds as 0:42, 12:05 or 1:02:03.

  >>> _minutes(42.2), _minutes(725), _minutes(3723)
  ('0:42', '12:05', '1:02:03')
  """
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minute:02}:{second:02}"
  return f"{minute}:{second:02}"
