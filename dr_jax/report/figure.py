"""Figures without a display, by matplotlib, from the extra `report`."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

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
