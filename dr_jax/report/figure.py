"""Figures without a display, by matplotlib, from the extra `report`."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from dr_jax.report.chart import Chart
from dr_jax.runtime import files

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
  """Returns an empty figure, its size in inches.

  Raises:
    ImportError: if matplotlib is not installed, saying how to install it.
  """
  try:
    # Slow to import, and only figures need it. Its pyplot would look for a
    # display and keep figures alive.
    from matplotlib.figure import Figure
  except ImportError:
    raise ImportError(
      "figures need matplotlib: pip install 'dr_jax[report]'"
    ) from None
  return Figure(figsize=(width, height), layout="constrained")


def plot_lines(path: str | os.PathLike, chart: Chart) -> None:
  """Draws a chart that has lines alone as PNG or SVG.

  Raises:
    ImportError: as `new_figure`.
    ValueError: as `save_figure`.
  """
  figure = new_figure(6, 4)
  axes = figure.subplots()
  for trace in chart.figure["data"]:
    axes.plot(
      trace["x"],
      [float("nan") if y is None else y for y in trace["y"]],
      label=trace["name"],
      color=trace["line"]["color"],
      linestyle="--" if "dash" in trace["line"] else "-",
      marker="o" if "markers" in trace["mode"] else None,
    )
  layout = chart.figure["layout"]
  axes.set_xlabel(layout["xaxis"]["title"]["text"])
  axes.set_ylabel(layout["yaxis"]["title"]["text"])
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  save_figure(figure, path)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
  """Writes a figure as a whole, as PNG or SVG by the suffix of the path.

  Raises:
    ValueError: for another suffix.
  """
  kind = files.expand(path).suffix.removeprefix(".")
  # The same figure is the same file, whenever it is drawn.
  metadata = {"Date": None} if kind == "svg" else None
  content = io.BytesIO()
  figure.savefig(content, format=kind, metadata=metadata)
  files.write_bytes(path, content.getvalue())
