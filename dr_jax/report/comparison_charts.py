"""Charts over several methods of a comparison, or over several runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dr_jax.report.chart import (
  GRAY,
  Chart,
  bits_name,
  color,
  figure,
  finite,
  plain,
)
from dr_jax.report.comparison import Results, mean_of, std_of
from dr_jax.report.results import last_network
from dr_jax.report.runs import Run
from dr_jax.runtime.tasks import TASKS


def methods(results: Results) -> Chart:
  """The metric against bytes: a line per method, a point per bit-width."""
  task, rows = TASKS[results["task"]], dict(results["rows"])
  base = finite(mean_of(task, rows.pop("float")["scores"]["float"]))
  data = []
  for number, (name, row) in enumerate(rows.items()):
    points = sorted(
      (row["bytes_at"][b], mean_of(task, score), std_of(task, score), b)
      for b, score in row["scores"].items()
    )
    size, value, error, bits = zip(*points, strict=True)
    line = _against_bytes(name, size, value, bits, number)
    line["error_y"] = {
      "type": "data",
      "array": list(map(finite, error)),
      "color": color(number),
      "thickness": 1,
    }
    data.append(line)
  layout: dict[str, Any] = {}
  if base is not None and data:
    data.append(_float_line(base, data))
    # What breaks down at few bits would flatten all else.
    worst = -task.range if task.higher_is_better else task.range
    layout["yaxis"] = {"range": sorted((base + worst, base - 0.15 * worst))}
  return Chart(
    "methods",
    "Methods compared",
    f"{task.metric.capitalize()} on the test set against bytes of a copy "
    "that serves one bit-width; the dashed line is the float network. Means "
    f"and standard deviations, seeds: {len(results['seeds'])}. "
    "Double-click to see what is far below.",
    figure(
      data,
      x="bytes of a copy for one bit-width",
      y=task.metric,
      height=560,
      **layout,
    ),
  )


def training_seconds(results: Results) -> Chart:
  """Seconds of training of every method."""
  rows = results["rows"]
  return Chart(
    "training-seconds",
    "Time of training",
    "Seconds of all training steps of a row, mean over seeds; the float "
    "network, from which all start, is trained once.",
    figure(
      [
        {
          "type": "bar",
          "orientation": "h",
          "y": list(map(plain, rows)),
          "x": [finite(row["train_seconds"]) for row in rows.values()],
          "marker": {"color": color(0)},
          "hovertemplate": "%{y}: %{x:.1f} s<extra></extra>",
        }
      ],
      x="seconds",
      height=100 + 26 * len(rows),
      yaxis={"autorange": "reversed"},
    ),
  )


def runs_by_bits(runs: Sequence[tuple[str, Run]]) -> Chart | None:
  """The metric per bit-width, a line per run."""
  task = TASKS[runs[0][1].task]
  data = [
    {
      "type": "scatter",
      "mode": "lines+markers",
      "name": plain(name),
      "x": [bits_name(b) for b in scores],
      "y": [finite(task.value(score)) for score in scores.values()],
      "line": {"color": color(number)},
      "marker": {"size": 8},
    }
    for number, (name, run) in enumerate(runs)
    if (scores := scores_of(run))
  ]
  if not data:
    return None
  return Chart(
    "runs",
    "Runs compared, per bit-width",
    f"{task.metric.capitalize()} on the test set of each run's last network.",
    figure(data, x="weights and activations", y=task.metric),
  )


def runs_by_bytes(runs: Sequence[tuple[str, Run]]) -> Chart | None:
  """The metric against bytes, a line per run that was exported."""
  task = TASKS[runs[0][1].task]
  data = []
  for number, (name, run) in enumerate(runs):
    if (export := run.stages.get("export")) is None:
      continue
    points = sorted(
      (export["bytes_at"][str(b)], task.value(export["scores"][str(b)]), b)
      for b in run.bits
    )
    size, value, bits = zip(*points, strict=True)
    data.append(_against_bytes(name, size, value, bits, number))
  if not data:
    return None
  return Chart(
    "runs-bytes",
    "Runs compared, by size",
    f"{task.metric.capitalize()} on the test set against bytes of a copy "
    "that serves one bit-width.",
    figure(data, x="bytes of a copy for one bit-width", y=task.metric),
  )


def scores_of(run: Run) -> dict[Any, dict[str, float]]:
  """Scores of the last network of a run by bit-width, float first."""
  found = {}
  if "pretrain" in run.stages:
    found["float"] = run.stages["pretrain"]["scores"]["float"]
  if (last := last_network(run.stages)) is not None:
    found |= {b: last["scores"][str(b)] for b in run.bits}
  return found


def _against_bytes(name, size, value, bits, number):
  return {
    "type": "scatter",
    "mode": "lines+markers",
    "name": plain(name),
    "x": list(size),
    "y": list(map(finite, value)),
    "text": list(map(bits_name, bits)),
    "line": {
      "color": color(number),
      "dash": ("solid", "dot", "dash")[number // 10 % 3],
    },
    "marker": {"size": 7},
    "hovertemplate": "%{text}: %{y:.2f}, %{x:,} bytes",
  }


def _float_line(base, data):
  ends = [end for line in data for end in line["x"]]
  return {
    "type": "scatter",
    "mode": "lines",
    "name": "float",
    "x": [min(ends), max(ends)],
    "y": [base, base],
    "line": {"color": GRAY, "dash": "dash"},
  }
