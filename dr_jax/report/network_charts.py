"""Charts of a trained network: gradients of its scales, weights and grids.

Each takes a `runs.Run` and returns a chart, or None without its data.
"""

from __future__ import annotations

from typing import Any

from dr_jax.report.chart import Chart, bits_colors, bits_name, color, figure
from dr_jax.report.runs import Run


def scale_gradients(run: Run) -> Chart | None:
  """The gradient of every learned scale at every bit-width: boxes, points."""
  record = run.network and run.network["gradients"]
  if not record or not record["scales"]:
    return None
  return Chart(
    "scale-gradients",
    "Gradients of scales per bit-width",
    "Largest magnitude of the loss's gradient for the scales of each layer, at "
    f"the trained parameters, on one batch of {record['examples']} training "
    "examples; the loss is cross-entropy with the labels. Adaptive learning "
    "rate scaling (ALRS) exists since scales of few bits tend to have far "
    "larger gradients than those of many.",
    figure(
      [
        _boxes(run.bits, record["scales"], of, color(number))
        for number, of in enumerate(("weight", "input"))
      ],
      x="bit-width of the pass",
      y="largest |gradient|",
      yaxis={"type": "log", "exponentformat": "power"},
      boxmode="group",
    ),
  )


def _boxes(bits, scales, of, shade):
  points = [
    (bits_name(b), size, scale["layer"])
    for b in bits
    for scale in scales
    # A logarithm has no place for what a pass does not reach.
    if scale["of"] == of and (size := scale["gradient"].get(str(b), 0)) > 0
  ]
  return {
    "type": "box",
    "name": f"{of} scales",
    "x": [name for name, _, _ in points],
    "y": [size for _, size, _ in points],
    "text": [layer for _, _, layer in points],
    "boxpoints": "all",
    "jitter": 0.4,
    "pointpos": 0,
    "marker": {"size": 4, "color": shade},
    "hovertemplate": "%{text}: %{y:.3g}<extra></extra>",
  }


def weights(run: Run) -> Chart | None:
  """Histograms of a layer's weights over each grid, a layer at a time."""
  record = run.network and run.network["weights"]
  if not record:
    return None
  colors = bits_colors(run.bits)
  data: list[Any] = []
  for number, by_bits in enumerate(record.values()):
    for row, b in enumerate(run.bits):
      shown = {"visible": not number, **_axes_of(row)}
      histogram = by_bits[str(b)]
      data.append(_histogram(histogram, b, colors[b]) | shown)
      data.append(_grid(histogram, b, colors[b]) | shown)
  layout: dict[str, Any] = {}
  height = 1 / len(run.bits)
  for row, b in enumerate(run.bits):
    suffix = str(row + 1) if row else ""
    top = 1 - row * height
    layout[f"xaxis{suffix}"] = {"anchor": f"y{suffix}", "automargin": True}
    layout[f"yaxis{suffix}"] = {
      "title": {"text": bits_name(b)},
      "domain": [top - 0.72 * height, top],
      "anchor": f"x{suffix}",
      "automargin": True,
      "nticks": 3,
    }
  return Chart(
    "weights",
    "Weights and grids",
    "Weights of one layer, chosen above, and below them the values to which "
    "each bit-width rounds them, in units of the layer's learned scales where "
    "its method has them. Without marks the channels have different grids.",
    figure(
      data,
      height=170 * len(run.bits) + 60,
      showlegend=False,
      bargap=0,
      margin={"l": 10, "r": 10, "t": 60, "b": 10},
      updatemenus=[_menu(list(record), 2 * len(run.bits))],
      **layout,
    ),
  )


def _axes_of(row):
  suffix = str(row + 1) if row else ""
  return {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}


def _histogram(histogram, b, shade):
  low, high, counts = (histogram[k] for k in ("low", "high", "counts"))
  width = (high - low) / max(len(counts), 1)
  return {
    "type": "bar",
    "name": bits_name(b),
    "x": [low + (n + 0.5) * width for n in range(len(counts))],
    "y": counts,
    "marker": {"color": shade, "line": {"width": 0}},
    "opacity": 0.75,
    "hovertemplate": "%{x:.3g}: %{y}<extra></extra>",
  }


def _grid(histogram, b, shade):
  """A mark for each level, below the bars."""
  below = -0.08 * max(histogram["counts"], default=0)
  levels = histogram["levels"]
  return {
    "type": "scatter",
    "mode": "markers",
    "name": f"grid of {bits_name(b)}",
    "x": levels,
    "y": [below] * len(levels),
    "marker": {
      "symbol": "line-ns",
      "size": 12,
      "line": {"width": 1.5, "color": shade},
    },
    "hovertemplate": "level %{x:.4g}<extra></extra>",
  }


def _menu(layers, traces):
  """Chooses the layer whose traces are visible."""
  return {
    "x": 0,
    "xanchor": "left",
    "y": 1,
    "yanchor": "bottom",
    "pad": {"b": 12},
    "direction": "down",
    "buttons": [
      {
        "label": name,
        "method": "restyle",
        "args": [
          "visible",
          [n // traces == number for n in range(traces * len(layers))],
        ],
      }
      for number, name in enumerate(layers)
    ],
  }
