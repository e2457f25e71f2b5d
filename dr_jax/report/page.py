"""One self-contained HTML page: its charts, tables, style and scripts.

Nothing is fetched: plotly.js, from the extra `report`, is part of the page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from rich.table import Table

from dr_jax.report.chart import Chart

Part = Chart | Table | tuple[str, Mapping[str, Any]]


def render_page(title: str, parts: Sequence[Part | None]) -> str:
  """Returns a page as HTML text.

  Args:
    title: of the page; plain text, as all words of its parts.
    parts: charts, tables, and (heading, nested dict) for what is unfolded on
      demand; None is left out.

  Raises:
    ImportError: if plotly is not installed, saying how to install it.
  """
  given = [part for part in parts if part is not None]
  charts = [
    {"name": part.name, "figure": part.figure}
    for part in given
    if isinstance(part, Chart)
  ]
  return _PAGE.format(
    title=html.escape(title),
    style=_resource("page.css"),
    body="\n".join(map(_section, given)),
    charts=_as_script(charts),
    plotly=_plotly(),
    script=_resource("page.js"),
  )


def _plotly() -> str:
  """The text of plotly.js."""
  try:
    # Pages alone need it.
    from plotly.offline import get_plotlyjs
  except ImportError:
    raise ImportError(
      "pages need plotly: pip install 'dr_jax[report]'"
    ) from None
  return get_plotlyjs()


def _section(part):
  if isinstance(part, Chart):
    inner = _chart(part)
  elif isinstance(part, Table):
    inner = _table(part)
  else:
    heading, values = part
    text = html.escape(json.dumps(values, indent=2))
    inner = (
      f"<details><summary>{html.escape(heading)}</summary>"
      f"<pre>{text}</pre></details>"
    )
  return f"<section>\n{inner}\n</section>"


def _chart(chart):
  name = html.escape(chart.name)
  lines = [
    f"<h2>{html.escape(chart.title)}</h2>",
    f"<p>{html.escape(chart.caption)}</p>",
    f'<div class="chart" id="{name}"></div>',
  ]
  if any("customdata" in trace for trace in chart.figure["data"]):
    lines.append(f'<p class="picked" id="{name}-picked" role="status"></p>')
  return "\n".join(lines)


def _table(table):
  heading = f"<h2>{_text(table.title)}</h2>" if table.title else ""
  caption = f"<p>{_text(table.caption)}</p>" if table.caption else ""
  header = "".join(f"<th>{_text(c.header)}</th>" for c in table.columns)
  rows = zip(*(column.cells for column in table.columns), strict=True)
  body = "\n".join(
    f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>"
    for row in rows
  )
  return (
    f'{heading}{caption}<div class="wide"><table>\n<thead><tr>{header}</tr>'
    f"</thead>\n<tbody>\n{body}\n</tbody></table></div>"
  )


def _text(cell):
  return html.escape(str(cell))


def _as_script(value):
  """JSON that ends no script element, whatever a name in it says."""
  text = json.dumps(value, allow_nan=False, separators=(",", ":"))
  return text.replace("<", "\\u003c")


def _resource(name):
  return resources.files("dr_jax.report").joinpath(name).read_text("utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script id="charts" type="application/json">{charts}</script>
<script>{plotly}</script>
<script>
{script}</script>
</body>
</html>
"""
