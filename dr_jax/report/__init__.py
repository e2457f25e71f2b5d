"""Pages, tables and figures from what runs wrote: functions of plain data."""

from dr_jax.report.comparison import (
  comparison_markdown,
  comparison_table,
  plot_comparison,
)
from dr_jax.report.figure import new_figure
from dr_jax.report.pages import (
  PAGE,
  comparison_page,
  page_of,
  run_page,
  runs_page,
  write_page,
)
from dr_jax.report.runs import Run, read_comparison, read_run
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
  "PAGE",
  "Run",
  "comparison_markdown",
  "comparison_page",
  "comparison_table",
  "front",
  "new_figure",
  "page_of",
  "plot_comparison",
  "plot_searches",
  "read_comparison",
  "read_run",
  "run_page",
  "runs_page",
  "search_summary",
  "search_table",
  "summary_table",
  "write_page",
]
