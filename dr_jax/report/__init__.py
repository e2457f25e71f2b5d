"""Tables and plots from what a run wrote."""

from dr_jax.report.pareto import (
  front,
  pareto_table,
  plot_pareto,
  write_pareto,
)

__all__ = ["front", "pareto_table", "plot_pareto", "write_pareto"]
