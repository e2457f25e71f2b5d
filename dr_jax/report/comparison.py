"""Tables and a figure of what a comparison of methods found.

Results are what compare.json holds: {"task", "rows": {row: {"scores": {bits:
{"accuracy", "loss": {"mean", "std", "seeds"}}}, "bytes_at": {bits: n},
"tensor_bytes", "train_seconds"}}, "seeds", "environment"}.

    python -m dr_jax.report.comparison COMPARE.json FIGURE.svg

draws the task's metric against bytes for all methods.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from dr_jax.report.chart import bits_name
from dr_jax.report.figure import new_figure, save_figure
from dr_jax.runtime.files import read_json
from dr_jax.runtime.schema import COUNT, NUMBER, Where
from dr_jax.runtime.tasks import TASKS, Task

Results = dict[str, Any]

_SPREAD = {"mean": NUMBER, "std": NUMBER, "seeds": [NUMBER]}
_ROW = {
  "scores": {...: {"accuracy": _SPREAD, "loss": _SPREAD}},
  "bytes_at": {...: COUNT},
  "tensor_bytes": COUNT,
  "train_seconds": NUMBER,
}
_RESULTS = {
  "task": Where(str, TASKS.__contains__, f"one of {', '.join(TASKS)}"),
  "rows": {"float": _ROW, ...: _ROW},
  "seeds": [COUNT],
  "environment": {...: str},
  ...: object,
}


def read_results(path: str | os.PathLike) -> Results:
  """Reads compare.json.

  Raises:
    ValueError: if it is damaged, naming it and the entry.
    OSError: if it cannot be read.
  """
  results = read_json(path, _RESULTS)
  for name, row in results["rows"].items():
    labels = list(row["scores"])
    if not labels or set(labels) != set(row["bytes_at"]):
      raise ValueError(
        f"{path} is damaged: rows.{name}.bytes_at must be of the bit-widths of "
        f"scores, {labels}, got {list(row['bytes_at'])}"
      )
  if "float" not in results["rows"]["float"]["scores"]:
    raise ValueError(f"{path} is damaged: rows.float must have scores of float")
  return results


def comparison_table(results: Results) -> Table:
  """One row per method; per bit-width the metric, cross-entropy and bytes.

  Bytes are those of all tensors, without names and manifest: of a copy whose
  weights serve one bit-width, with norms and input scales of every bit-width.
  """
  shown = Table(
    title=f"{TASKS[results['task']].metric} (mean and standard deviation of "
    f"{len(results['seeds'])} seeds), cross-entropy, bytes of a copy",
    show_lines=True,
  )
  header, *rows = _cells(results, "\n")
  for column, name in enumerate(header):
    shown.add_column(name, justify="right" if column else "left")
  for row in rows:
    shown.add_row(*row)
  return shown


def comparison_markdown(results: Results) -> str:
  """The same table for a text file."""
  header, *rows = _cells(results, "<br>")
  align = ["---", *["---:"] * (len(header) - 1)]
  lines = [header, align, *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(results, newline):
  """The table as text, header first."""
  rows, task = results["rows"], TASKS[results["task"]]
  columns = list(
    dict.fromkeys(b for row in rows.values() for b in row["scores"])
  )
  yield [
    "method",
    *(bits_name(b) for b in columns),
    "bytes stored",
    "training s",
  ]
  for name, row in rows.items():
    cells = [name]
    for b in columns:
      lines = []
      if b in row["scores"]:
        mean, std = (_part(row["scores"][b], part) for part in ("mean", "std"))
        lines = [
          f"{task.shown(mean)} ± {task.shown(std)}",
          f"{mean['loss']:.3f} ± {std['loss']:.3f}",
          f"{row['bytes_at'][b]:,}",
        ]
      cells.append(newline.join(lines))
    cells.append(f"{row['tensor_bytes']:,}")
    cells.append(f"{row['train_seconds']:.1f}")
    yield cells


def _part(score, part):
  """The means of {"accuracy", "loss"}, or their standard deviations."""
  return {kind: spread[part] for kind, spread in score.items()}


def plot_comparison(path: str | os.PathLike, results: Results) -> None:
  """Draws the task's metric, a mean on the test set, against bytes.

  A line is a method, a point a bit-width, at the bytes of a copy that serves it
  alone; the dashed line is the float network. Points further from it than the
  task's `range` are not shown.

  Args:
    path: of an SVG or PNG file.
    results: of a comparison.
  """
  figure = new_figure(9, 5)
  axes = figure.subplots()
  rows, task = dict(results["rows"]), TASKS[results["task"]]
  base = mean_of(task, rows.pop("float")["scores"]["float"])
  axes.axhline(base, color="0.5", linestyle="--", linewidth=1, label="float")
  for number, (name, row) in enumerate(rows.items()):
    points = [
      (row["bytes_at"][bits], mean_of(task, score))
      for bits, score in row["scores"].items()
    ]
    ours = name.startswith("double rounding")
    axes.plot(
      *zip(*sorted(points), strict=True),
      marker="os^Dv"[number % 5],
      markersize=6 if ours else 4,
      linewidth=3 if ours else 1,
      color=None if not ours else ("0.0" if name.endswith("ng") else "0.4"),
      linestyle="-" if ours or number < 10 else ":",
      label=name,
    )
  # What breaks down at few bits would flatten all else.
  worst = -task.range if task.higher_is_better else task.range
  axes.set_ylim(*sorted((base + worst, base - 0.15 * worst)))
  axes.set_xlabel("bytes of a copy for one bit-width")
  axes.set_ylabel(f"{task.metric}, test set")
  axes.grid(alpha=0.3)
  axes.legend(
    loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False
  )
  save_figure(figure, path)


def mean_of(task: Task, score: Mapping[str, Any]) -> float:
  """The task's metric, a mean over seeds."""
  return task.value(_part(score, "mean"))


def std_of(task: Task, score: Mapping[str, Any]) -> float:
  """The standard deviation of the task's metric over seeds."""
  return task.value(_part(score, "std"))


def main(arguments: Sequence[str]) -> None:
  """Draws the figure of a comparison's results."""
  if len(arguments) != 2:
    sys.exit(
      "usage: python -m dr_jax.report.comparison COMPARE.json FIGURE.svg"
    )
  try:
    plot_comparison(arguments[1], read_results(arguments[0]))
  except (OSError, ValueError) as error:
    sys.exit(str(error))


if __name__ == "__main__":
  main(sys.argv[1:])
