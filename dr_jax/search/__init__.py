"""Strategies that find bit-widths for the layers of a trained network.

Each is `strategy(problem, budgets, *, seed=0, ...) -> Result`, with options of
its own that have defaults, so that any of them can stand for any other.
"""

from dr_jax.search.baselines import proportional, random, uniform
from dr_jax.search.differentiable import dnas, edmips
from dr_jax.search.genetic import genetic
from dr_jax.search.greedy import greedy
from dr_jax.search.hessian_ilp import (
  hessian_ilp,
  quantization_errors,
  sensitivity_tables,
)
from dr_jax.search.problem import Evaluator, Ledger, Problem, Result, Trial
from dr_jax.search.reinforce import reinforce

__all__ = [
  "SEARCHES",
  "Evaluator",
  "Ledger",
  "Problem",
  "Result",
  "Trial",
  "dnas",
  "edmips",
  "genetic",
  "greedy",
  "hessian_ilp",
  "proportional",
  "quantization_errors",
  "random",
  "reinforce",
  "sensitivity_tables",
  "uniform",
]

SEARCHES = {
  "hessian_ilp": hessian_ilp,
  "greedy": greedy,
  "genetic": genetic,
  "edmips": edmips,
  "dnas": dnas,
  "reinforce": reinforce,
  "uniform": uniform,
  "random": random,
  "proportional": proportional,
}
