"""A chart of a page: a figure of plotly.js as plain data, and its words.

Figures are {"data": [trace, ...], "layout": {...}}, so that making one takes
no plotting library. Colors of text and grids are the page's (`page.js`), in
light and in dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Trace = dict[str, Any]

# Readable on white and on black.
COLORS = (
  *("#2f7ed8", "#d9730d", "#2a9d5c", "#c2438f", "#8a63d2", "#159aa8"),
  *("#b08a00", "#d64545", "#6b8e23", "#7a7f8a"),
)
GRAY = "#7f8792"


class Chart(NamedTuple):
  """One figure with its title and what it shows.

  Attributes:
    name: letters, digits and "-"; its id in the page.
    title, caption: plain text.
    figure: {"data", "layout"} for plotly.js.
  """

  name: str
  title: str
  caption: str
  figure: dict[str, Any]


def figure(
  data: Sequence[Trace], *, x: str = "", y: str = "", **layout: Any
) -> dict[str, Any]:
  """Returns a figure with a legend below it, narrow enough for a phone.

  Args:
    data: its traces.
    x, y: titles of the axes.
    **layout: more of plotly's layout; "xaxis" and "yaxis" add to the titles.
  """
  axes = {
    name: {"title": {"text": title}, "automargin": True, **layout.pop(name, {})}
    for name, title in (("xaxis", x), ("yaxis", y))
  }
  defaults = {
    "height": 380,
    "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
    "legend": {
      "orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"
    },
    "hovermode": "closest",
  }  # fmt: skip
  return {"data": list(data), "layout": defaults | axes | layout}


def color(position: int) -> str:
  """The color of a trace by its position."""
  return COLORS[position % len(COLORS)]


def bits_colors(bits: Iterable[Any]) -> dict[Any, str]:
  """A color per bit-width, the same in all charts of a run; gray for float."""
  return {b: color(n) for n, b in enumerate(bits)} | {"float": GRAY}


def plain(text: str) -> str:
  """Text for a figure, where plotly.js reads tags and entities.

  >>> plain("<b>&")
  '&lt;b&gt;&amp;'
  """
  return html.escape(text, quote=False)


def finite(value: Any) -> float | None:
  """A number that can be drawn; None for NaN and infinities.

  >>> finite("NaN"), finite(2)
  (None, 2.0)
  """
  number = float(value)
  return number if math.isfinite(number) else None


def bits_name(bits: Any) -> str:
  """The bit-width in words.

  >>> bits_name(8), bits_name("1"), bits_name("float"), bits_name("random")
  ('8 bits', '1 bit', 'float', 'random')
  """
  if not str(bits).isdigit():
    return str(bits)
  return f"{bits} bit" if str(bits) == "1" else f"{bits} bits"
