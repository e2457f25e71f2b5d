"""Tables and plots from what a run wrote."""

from dr_jax.report.pareto import (
  COLUMNS,
  front,
  pareto,
  pareto_table,
  plot_pareto,
)

__all__ = ["COLUMNS", "front", "pareto_table", "plot_pareto", "pareto"]
