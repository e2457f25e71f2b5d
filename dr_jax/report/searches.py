"""What searches found: a table, a plot, and the same as JSON.

A row is what the stage search writes for one strategy and budget: "strategy",
"budget" (mean bits), "allocation", "cost" {name: int}, "eval" and "test"
{"accuracy", "loss"}, "evaluations", "seconds", "evaluation_seconds".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from dr_jax.report.figure import new_figure, save_figure
from dr_jax.runtime.tasks import TASKS

Row = dict[str, Any]

# Of the table, after the budget, the search and the task's metric.
COLUMNS = (
  "cross-entropy",
  "weight bytes",
  "MBOPs",
  "evaluations",
  "search s",
  "evaluation s",
)

# Costs of the figures: the name of each axis, and what a cost is divided by.
AXES = {
  "stored_bits": ("bytes of the weights", 8),
  "bops": ("bit operations, millions", 10**6),
}


def front(
  rows: Sequence[Row], cost: str, task: str = "classification"
) -> list[Row]:
  """Returns the rows that no other row beats in cost and test score.

  Args:
    rows: what searches found.
    cost: a name in the rows' costs.
    task: a name of `runtime.tasks.TASKS`, whose metric is the score.

  Returns:
    Rows by rising cost, each with a better score than those before.

  >>> def row(bits, accuracy):
  ...   return {"cost": {"bits": bits}, "test": {"accuracy": accuracy}}
  >>> rows = [row(4, 90.0), row(6, 89.0), row(8, 92.0)]
  >>> [r["cost"]["bits"] for r in front(rows, "bits")]
  [4, 8]
  """
  cost_of = TASKS[task].cost
  ranked = sorted(rows, key=lambda r: (r["cost"][cost], cost_of(r["test"])))
  kept: list[Row] = []
  for row in ranked:
    if not kept or cost_of(row["test"]) < cost_of(kept[-1]["test"]):
      kept.append(row)
  return kept


def search_summary(
  rows: Sequence[Row], task: str = "classification"
) -> dict[str, Any]:
  """Returns the points of every search and the fronts over all of them.

  {"points": {strategy: [{"budget", "stored_bytes", "bops", "accuracy", "loss",
  "eval", "evaluations", "seconds", "evaluation_seconds", "allocation"}]},
  "front": {"stored_bits": [[strategy, budget], ...], "bops": [...]}}; accuracy
  and loss on the test set, and "eval" both on the images that the search
  scored assignments on.
  """
  return {
    "points": {
      strategy: [_point(row) for row in rows if row["strategy"] == strategy]
      for strategy in strategies(rows)
    },
    "front": {
      cost: [[r["strategy"], r["budget"]] for r in front(rows, cost, task)]
      for cost in AXES
    },
  }


def _point(row):
  return {
    "budget": row["budget"],
    "stored_bytes": row["cost"]["stored_bits"] / 8,
    "bops": row["cost"]["bops"],
    **row["test"],
    "eval": row["eval"],
    "evaluations": row["evaluations"],
    "seconds": row["seconds"],
    "evaluation_seconds": row["evaluation_seconds"],
    "allocation": row["allocation"],
  }


def plot_searches(
  path: str | os.PathLike, rows: Sequence[Row], task: str = "classification"
) -> None:
  """Draws the task's metric on the test set against weight bytes and BOPs.

  A PNG or SVG; a line per strategy, through its budgets; the front of all in
  gray.
  """
  metric = TASKS[task]
  figure = new_figure(12, 5)
  for axes, (cost, (label, unit)) in zip(
    figure.subplots(1, 2, sharey=True), AXES.items(), strict=True
  ):
    best = front(rows, cost, task)
    axes.step(
      [row["cost"][cost] / unit for row in best],
      [metric.value(row["test"]) for row in best],
      where="post",
      color="0.85",
      linewidth=8,
      label="front",
    )
    for strategy in strategies(rows):
      mine = [row for row in rows if row["strategy"] == strategy]
      mine.sort(key=lambda row: row["cost"][cost])
      axes.plot(
        [row["cost"][cost] / unit for row in mine],
        [metric.value(row["test"]) for row in mine],
        marker="o",
        markersize=4,
        linewidth=1,
        label=strategy,
      )
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
  figure.axes[0].set_ylabel(f"{metric.metric}, test set")
  figure.axes[1].legend(fontsize="small")
  save_figure(figure, path)


def search_table(
  rows: Sequence[Row],
  task: str = "classification",
  *,
  title: str | None = None,
) -> Table:
  """Lists what each search found, by budget."""
  table = Table(title=title)
  table.add_column("budget")
  table.add_column("search")
  for column in (TASKS[task].metric, *COLUMNS):
    table.add_column(column, justify="right")
  for row in rows:
    table.add_row(
      f"{row['budget']:g}",
      row["strategy"],
      TASKS[task].shown(row["test"]),
      f"{row['test']['loss']:.4f}",
      f"{row['cost']['stored_bits'] / 8:,.0f}",
      f"{row['cost']['bops'] / 1e6:.2f}",
      str(row["evaluations"]),
      f"{row['seconds']:.1f}",
      f"{row['evaluation_seconds']:.1f}",
    )
  return table


def strategies(rows: Sequence[Row]) -> list[str]:
  """Returns the strategies of rows, once each and in order."""
  return list(dict.fromkeys(row["strategy"] for row in rows))
