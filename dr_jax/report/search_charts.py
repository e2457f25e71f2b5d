"""Charts of what searches found: Pareto fronts, and bits beside traces.

Rows are those of the stage search; see `searches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dr_jax.report.chart import (
  GRAY,
  Chart,
  Trace,
  bits_colors,
  color,
  figure,
  finite,
)
from dr_jax.report.runs import Run
from dr_jax.report.searches import AXES, front, strategies
from dr_jax.runtime.tasks import TASKS


def pareto(run: Run) -> list[Chart]:
  """The metric on the test set against each cost, a line per strategy."""
  rows = run.stages.get("search", {}).get("rows", [])
  if not rows:
    return []
  task = TASKS[run.task]
  return [
    Chart(
      f"pareto-{cost.replace('_', '-')}",
      f"Pareto front: {label}",
      f"{task.metric.capitalize()} on the test set of what each search found "
      "under each budget; the gray line is the front of all. Point at an "
      "allocation to see its cost; tap or click it for the bits of every "
      "layer.",
      figure(
        [
          _front(front(rows, cost, run.task), cost, unit, task),
          *(
            _strategy(
              [row for row in rows if row["strategy"] == name],
              cost,
              unit,
              task,
              color(number),
            )
            for number, name in enumerate(strategies(rows))
          ),
        ],
        x=label,
        y=task.metric,
        height=460,
      ),
    )
    for cost, (label, unit) in AXES.items()
  ]


def _front(rows, cost, unit, task) -> Trace:
  return {
    "type": "scatter",
    "mode": "lines",
    "name": "front",
    "x": [row["cost"][cost] / unit for row in rows],
    "y": [finite(task.value(row["test"])) for row in rows],
    "line": {"color": GRAY, "width": 10, "shape": "hv"},
    "opacity": 0.35,
    "hoverinfo": "skip",
  }


def _strategy(rows, cost, unit, task, line_color) -> Trace:
  rows = sorted(rows, key=lambda row: row["cost"][cost])
  return {
    "type": "scatter",
    "mode": "lines+markers",
    "name": rows[0]["strategy"],
    "x": [row["cost"][cost] / unit for row in rows],
    "y": [finite(task.value(row["test"])) for row in rows],
    "line": {"color": line_color, "width": 1},
    "marker": {"size": 8, "color": line_color},
    # The page shows the last one below the chart.
    "customdata": [_about(row, task) for row in rows],
    "hovertemplate": "%{customdata[0]}<extra></extra>",
  }


def _about(row, task):
  """Words to hover over a point, and its allocation."""
  cost = row["cost"]
  bits = list(row["allocation"].values())
  title = f"{row['strategy']}, budget {row['budget']:g} bits"
  words = (
    f"<b>{title}</b><br>{task.metric}: {task.shown(row['test'])}"
    f"<br>{cost['stored_bits'] / 8:,.0f} bytes, {cost['bops'] / 1e6:,.2f} MBOPs"
    f"<br>bits: {_wrapped(bits)}"
  )
  layers = ", ".join(f"{name}: {b}" for name, b in row["allocation"].items())
  return [words, f"{title}: {layers}"]


def _wrapped(bits: Sequence[int]) -> str:
  """Bits in the order of the layers, sixteen a line.

  >>> _wrapped([8, 4])
  '8 4'
  """
  lines = [bits[start : start + 16] for start in range(0, len(bits), 16)]
  return "<br>".join(" ".join(map(str, line)) for line in lines)


def traces(run: Run) -> Chart | None:
  """Traces of the Hessian with standard errors, beside the bits chosen."""
  found = run.stages.get("hessian", {}).get("traces", {})
  if not found:
    return None
  rows = run.stages.get("search", {}).get("rows", [])
  chosen = front(rows, "stored_bits", run.task)
  layers = list(found)
  data = [_estimates(found)]
  positive = all(estimate["mean"] > 0 for estimate in found.values())
  layout: dict[str, Any] = {
    "xaxis": {"type": "log" if positive else "linear", "nticks": 4},
    "yaxis": {"autorange": "reversed", "tickfont": {"size": 10}},
  }
  if chosen:
    data.append(_chosen_bits(layers, chosen, run.bits))
    layout["xaxis"]["domain"] = [0, 0.42]
    layout["xaxis2"] = {
      "domain": [0.46, 1],
      "type": "category",
      "tickangle": -90,
      "tickfont": {"size": 10},
      "automargin": True,
    }
  return Chart(
    "traces",
    "Hessian traces and bits",
    "Trace of the float network's Hessian in every quantized layer, with its "
    "standard error"
    + (
      "; beside it the bits of the layer in each allocation on the front of "
      "bytes, by strategy and mean bits."
      if chosen
      else "."
    ),
    figure(data, x="trace", height=160 + 22 * len(layers), **layout),
  )


def _estimates(found) -> Trace:
  return {
    "type": "scatter",
    "mode": "markers",
    "x": [estimate["mean"] for estimate in found.values()],
    "y": list(found),
    "error_x": {
      "type": "data",
      "array": [estimate["stderr"] for estimate in found.values()],
      "color": color(0),
    },
    "marker": {"size": 8, "color": color(0)},
    "showlegend": False,
    "hovertemplate": "%{y}: %{x:.4g} ± %{error_x.array:.2g}<extra></extra>",
  }


def _chosen_bits(layers, rows, bits) -> Trace:
  """A cell per layer and allocation, in the color of its bit-width."""
  colors = list(bits_colors(bits).values())[: len(bits)]
  shades = [
    [end / len(bits), shade]
    for number, shade in enumerate(colors)
    for end in (number, number + 1)
  ]
  chosen = [[row["allocation"].get(name) for row in rows] for name in layers]
  return {
    "type": "heatmap",
    "xaxis": "x2",
    "x": [f"{row['strategy']} {row['budget']:g}" for row in rows],
    "y": layers,
    # Positions in the candidates: bit-widths are not evenly spaced.
    "z": [[bits.index(b) if b in bits else None for b in r] for r in chosen],
    "text": [[str(b) for b in line] for line in chosen],
    "texttemplate": "%{text}",
    "textfont": {"color": "white"},
    "hovertemplate": "%{y}, %{x}: %{text} bits<extra></extra>",
    "colorscale": shades,
    "zmin": -0.5,
    "zmax": len(bits) - 0.5,
    "xgap": 1,
    "ygap": 1,
    "showscale": False,
  }
