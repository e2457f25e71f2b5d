"""What a run reports: numbers to a file, progress to the terminal.

metrics.jsonl holds one JSON object a line,

    {"stage": "multi_precision", "step": 120, "bits": 4, "name": "loss",
     "value": 0.123}

with `bits` null where a number belongs to no bit-width. JSON knows no NaN and
no infinities: they are the strings "NaN", "Infinity" and "-Infinity", which
`float` reads back.
"""

import collections
import json
import math
import os
import pathlib
import statistics
import time

import rich.console
import rich.progress
import rich.text

from dr_jax.runtime import files


class MetricsWriter:
  """Appends numbers to a file of JSON lines.

  Opening a file that a killed process left behind cuts off its last line if
  that is torn. Each `write` reaches the operating system before it returns.
  """

  def __init__(self, path):
    """Opens `path` for appending, creating it and its directories."""
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._path.touch()
    whole = self._path.read_bytes().rfind(b"\n") + 1
    os.truncate(self._path, whole)
    self._file = self._path.open("a", encoding="utf-8")

  def resume(self, stage, step, *, names=None):
    """Drops what `stage` wrote after `step`, which it is about to redo.

    With `names` it keeps only these numbers of the stage.
    """
    kept = [
      line
      for line in self._path.read_text(encoding="utf-8").splitlines(True)
      if (record := json.loads(line))["stage"] != stage
      or (record["step"] <= step and (not names or record["name"] in names))
    ]
    self._file.close()
    # The file is replaced as a whole: killed here, all of it is still there.
    files.write_text(self._path, "".join(kept))
    self._file = self._path.open("a", encoding="utf-8")

  def write(self, stage, step, values, *, bits=None):
    """Appends one line per value.

    Args:
      stage: name of the stage of the run.
      step: integer, the training step the values belong to.
      values: {name: number}, Python, numpy or JAX scalars.
      bits: the bit-width they belong to, if to one.
    """
    lines = [
      json.dumps(
        {
          "stage": stage,
          "step": int(step),
          "bits": bits,
          "name": name,
          "value": _as_json(value),
        },
        allow_nan=False,
      )
      for name, value in values.items()
    ]
    self._file.write("".join(line + "\n" for line in lines))
    self._file.flush()

  def training_seconds(self, stage, *, images_per_step):
    """Returns the seconds that the steps of `stage` and of its phases took.

    Steps times the median speed that was logged, so that neither compilation
    (in the first entry) nor evaluation nor a pause enters where there are
    three entries or more.
    """
    steps, speeds = {}, collections.defaultdict(list)
    for line in self._path.read_text(encoding="utf-8").splitlines():
      record = json.loads(line)
      phase = record["stage"]
      if record["name"] == "images_per_second" and f"{phase}/".startswith(
        f"{stage}/"
      ):
        steps[phase] = record["step"]
        speeds[phase].append(float(record["value"]))
    return sum(
      steps[phase] * images_per_step / statistics.median(speeds[phase])
      for phase in steps
    )

  def close(self):
    self._file.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()


class Progress:
  """How far a stage has come: a bar on a terminal, else a line now and then.

      multi_precision  step 120/400  loss 0.123  5230 images/s  0:42 left

  Speed and time left come from the last 30 seconds, and count from the first
  update on, so that compilation does not enter.
  """

  def __init__(
    self,
    stage,
    total_steps,
    *,
    start=0,
    interval=5.0,
    console=None,
    clock=time.monotonic,
  ):
    """Describes a stage that is at step `start` of `total_steps`.

    Args:
      stage: name of the stage.
      total_steps: the step at which the stage ends.
      start: the step from which it resumes.
      interval: seconds between two lines where there is no terminal.
      console: a `rich.console.Console`, of standard error by default.
      clock: returns the time in seconds.
    """
    self._console = console or rich.console.Console(stderr=True)
    self._stage, self._total, self._step = stage, total_steps, start
    self._clock, self._images, self._loss = clock, 0, None
    self._history = collections.deque()  # (time, step, images)
    self._shown_at, self._shown_step = clock(), start
    self._bar = None
    self._interval = interval
    if self._console.is_terminal:
      self._interval = 0.1
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[status]}", markup=False),
        console=self._console,
      )
      self._task = self._bar.add_task(
        stage, total=total_steps, completed=start, status=self._status()
      )

  def __enter__(self):
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exception):
    if self._step > self._shown_step:
      self._show()
    if self._bar:
      self._bar.stop()

  def update(self, step, *, images=0, loss=None):
    """Takes note of a finished step, and shows it if it is time to.

    Args:
      step: the number of steps done.
      images: how many images were seen since the last update.
      loss: a scalar. A JAX array is waited for only when it is shown.
    """
    now = self._clock()
    self._step, self._loss = step, loss
    self._images += images
    self._history.append((now, step, self._images))
    while self._history[0][0] < now - 30 and len(self._history) > 2:
      self._history.popleft()
    if now - self._shown_at >= self._interval:
      self._show()

  def print(self, text):
    """Prints a line, above the bar if there is one."""
    self._console.print(rich.text.Text(text), soft_wrap=True)

  def _show(self):
    self._shown_at, self._shown_step = self._clock(), self._step
    if self._bar:
      self._bar.update(self._task, completed=self._step, status=self._status())
    else:
      self.print(f"{self._stage}  {self._status()}")

  def _status(self):
    parts = [f"step {self._step}/{self._total}"]
    if self._loss is not None:
      parts.append(f"loss {float(self._loss):.4g}")
    if len(self._history) > 1:
      (before, first, images), (now, last, more) = (
        self._history[0],
        self._history[-1],
      )
      seconds = max(now - before, 1e-9)
      if more > images:
        parts.append(f"{(more - images) / seconds:.0f} images/s")
      if last > first:
        left = (self._total - last) * seconds / (last - first)
        parts.append(f"{_minutes(left)} left")
    return "  ".join(parts)


def _as_json(value):
  value = value.item() if hasattr(value, "item") else value
  if isinstance(value, float) and not math.isfinite(value):
    return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
  return value


def _minutes(seconds):
  """Returns seconds as 0:42, 12:05 or 1:02:03."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"
