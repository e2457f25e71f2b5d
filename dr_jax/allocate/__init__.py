"""Bit-widths for layers: what they cost, and the best ones for a budget."""

from dr_jax.allocate.allocation import Allocation, read_assignment
from dr_jax.allocate.costs import (
  between,
  bops,
  latency,
  mean_bits,
  mean_bits_budget,
  stored_bits,
)
from dr_jax.allocate.latency_table import LatencyTable
from dr_jax.allocate.pareto import Front, pareto
from dr_jax.allocate.solve import Infeasible, Solution, solve

__all__ = [
  "Allocation",
  "Front",
  "Infeasible",
  "LatencyTable",
  "Solution",
  "between",
  "bops",
  "latency",
  "mean_bits",
  "mean_bits_budget",
  "pareto",
  "read_assignment",
  "solve",
  "stored_bits",
]
