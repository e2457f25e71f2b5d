"""Tables and figures from what runs wrote: functions of plain dicts."""

from dr_jax.report.comparison import (
  comparison_markdown,
  comparison_table,
  plot_comparison,
)
from dr_jax.report.figure import new_figure
from dr_jax.report.searches import (
  COLUMNS,
  front,
  plot_searches,
  search_summary,
  search_table,
)
from dr_jax.report.summary import summary_table

__all__ = [
  "COLUMNS",
  "comparison_markdown",
  "comparison_table",
  "front",
  "new_figure",
  "plot_comparison",
  "plot_searches",
  "search_summary",
  "search_table",
  "summary_table",
]
