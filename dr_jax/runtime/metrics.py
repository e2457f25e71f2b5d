"""Numbers that a run measures, in one file.

metrics.jsonl holds one JSON object a line,

    {"stage": "multi_precision", "step": 120, "bits": 4, "name": "loss",
     "value": 0.123}

with `bits` null where a number belongs to no bit-width. A loss is the mean of
the steps since the entry before it. Where a checkpoint is taken in between,
`loss_sum` and `losses`, the sum and number of those so far, are for the run
that resumes there: its next mean is that of all steps. JSON has neither NaN
nor infinities: they are the strings "NaN", "Infinity" and "-Infinity", which
`float` reads back.
"""

from __future__ import annotations

import collections
import json
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import numpy as np

from dr_jax.runtime import files
from dr_jax.runtime.schema import COUNT, Where
from dr_jax.runtime.sinks import Sink

# What a run that resumes at a checkpoint needs to know.
BOOKKEEPING = ("loss_sum", "losses")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
RECORD = {
  "stage": str,
  "step": COUNT,
  "bits": (None, int, str),
  "name": str,
  "value": (float, Where(str, _NOT_FINITE.__contains__, "NaN or Infinity")),
}


class MetricsWriter:
  """Appends numbers to a file of JSON lines.

  Opening a file that a killed process left behind cuts off its last line if
  that is incomplete. Each `write` reaches the operating system before it
  returns.

  >>> import pathlib, tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
  >>> with MetricsWriter(path) as writer:
  ...   writer.write("train", 3, {"loss": 0.5}, bits=4)
  >>> path.read_text()
  '{"stage": "train", "step": 3, "bits": 4, "name": "loss", "value": 0.5}\\n'
  """

  def __init__(self, path: files.Path, sinks: Sequence[Sink] = ()):
    """Opens `path` for appending, creating it and its directories.

    Args:
      path: the file.
      sinks: where numbers go as well, but for those that a run leaves for
        itself (`BOOKKEEPING`); they stay open.

    Raises:
      OSError: if it cannot be opened, or is a link.
      ValueError: if it holds anything but such numbers; it is unchanged then.
    """
    self._path = files.expand(path)
    self._file, self._records = files.open_lines(self._path, RECORD)
    self._sinks = sinks

  def resume(
    self, stage: str, step: int, *, names: Collection[str] | None = None
  ) -> None:
    """Drops what `stage` wrote after `step`, which it is about to redo.

    With `names` it keeps only these numbers of the stage.
    """
    if names is None:
      for sink in self._sinks:
        sink.resume(stage, step)
    self._keep(
      lambda record: (
        record["stage"] != stage
        or (record["step"] <= step and (not names or record["name"] in names))
      )
    )

  def drop(self, stage: str, step: int, names: Collection[str]) -> None:
    """Drops these numbers of one step of a stage, to be written again."""
    if any(self.values(stage, step, name) for name in names):
      self._keep(
        lambda record: (
          (record["stage"], record["step"]) != (stage, step)
          or record["name"] not in names
        )
      )

  def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
    self._records = [record for record in self._records if wanted(record)]
    self._file.close()
    lines = [json.dumps(record) + "\n" for record in self._records]
    files.write_text(self._path, "".join(lines))
    self._file, _ = files.open_lines(self._path, RECORD)

  def values(self, stage: str, step: int, name: str) -> dict[Any, float]:
    """Returns {bits: number} of what was written at a step of a stage."""
    return {
      record["bits"]: float(record["value"])
      for record in self._records
      if (record["stage"], record["step"], record["name"])
      == (stage, step, name)
    }

  def write(
    self,
    stage: str,
    step: Any,
    values: Mapping[str, Any],
    *,
    bits: int | str | None = None,
  ) -> None:
    """Appends one line per value.

    Args:
      stage: name of the stage of the run.
      step: integer, the training step the values belong to.
      values: {name: number}, Python, numpy or JAX scalars.
      bits: the bit-width they belong to, if to one.
    """
    records = [
      {
        "stage": stage,
        "step": int(step),
        "bits": bits,
        "name": name,
        "value": _as_json(value),
      }
      for name, value in values.items()
    ]
    self._records += records
    lines = [json.dumps(record, allow_nan=False) for record in records]
    self._file.write("".join(line + "\n" for line in lines))
    self._file.flush()
    shown = {
      name: float(np.asarray(value))
      for name, value in values.items()
      if name not in BOOKKEEPING
    }
    for sink in self._sinks if shown else ():
      sink.write(stage, int(step), shown, bits=bits)

  def training_seconds(self, stage: str, *, examples_per_step: int) -> float:
    """Returns the seconds that the steps of `stage` and of its phases took.

    Steps times the median speed that was logged, so that neither compilation
    (in the first entry) nor evaluation nor a pause enters where there are
    three entries or more. Speeds of 0 and less were not measured.
    """
    steps, speeds = {}, collections.defaultdict(list)
    for record in self._records:
      phase = record["stage"]
      if (
        record["name"] == "examples_per_second"
        and f"{phase}/".startswith(f"{stage}/")
        and float(record["value"]) > 0
      ):
        steps[phase] = record["step"]
        speeds[phase].append(float(record["value"]))
    return sum(
      steps[phase] * examples_per_step / statistics.median(speeds[phase])
      for phase in steps
    )

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def _as_json(value: Any) -> Any:
  """A number as JSON has it: Python's, or the name of one not finite."""
  value = np.asarray(value).item()
  if isinstance(value, float) and not math.isfinite(value):
    return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
  return value
