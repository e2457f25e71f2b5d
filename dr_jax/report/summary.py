"""The table that a run ends with."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from dr_jax.report.results import last_network
from dr_jax.runtime.tasks import TASKS, Task


def summary_table(summary: dict[str, Any]) -> Table:
  """Bit-width, the task's metric and size, compared with the float network.

  Args:
    summary: what summary.json holds.
  """
  stages = summary["stages"]
  separate = any(name.startswith("separate/") for name in stages)
  export = stages.get("export")
  task = TASKS[summary["task"]]
  columns = ["bits", task.metric, "cross-entropy", "bytes", "of float %"]
  shown = Table(*columns, title=summary["name"])
  if separate:
    shown.add_column(f"separate LSQ, {task.metric}")
  for column in shown.columns:
    column.justify = "right"
  if "pretrain" in stages:
    score = stages["pretrain"]["scores"]["float"]
    size = export and export["float_bytes"]
    shown.add_row(*_row(task, "float", score, size, size))
  for bits in summary["bits"]:
    result = last_network(stages)
    alone = stages.get(f"separate/{bits}")
    row = [str(bits)] + [""] * 4
    if result is not None:
      size = export and export["bytes_at"][str(bits)]
      whole = export and export["float_bytes"]
      row = _row(task, str(bits), result["scores"][str(bits)], size, whole)
    if alone is not None:
      row.append(task.shown(alone["scores"][str(bits)]))
    shown.add_row(*row)
  if export:
    stored, whole = export["stored_bytes"], export["float_bytes"]
    shown.caption = (
      f"one artifact of {stored:,} bytes, {100 * stored / whole:.1f} % of "
      "float, serves every bit-width"
    )
  return shown


def _row(task: Task, name, score, size, whole):
  return [
    name,
    task.shown(score),
    f"{score['loss']:.4f}",
    f"{size:,}" if size else "",
    f"{100 * size / whole:.1f}" if size else "",
  ]
