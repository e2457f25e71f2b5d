"""Strategies that find bit-widths for the layers of a trained network.

Each is a function

    strategy(problem, budgets, evaluate, [sensitivity | supernet,]
             *, seed=0, ...) -> Result

whose options have defaults, so that any of them can take another's place;
`inputs_of` and `options_of` say what a strategy takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from dr_jax.search.baselines import proportional, random, uniform
from dr_jax.search.counts import Counts, counts
from dr_jax.search.dnas import dnas
from dr_jax.search.edmips import edmips
from dr_jax.search.evaluator import Evaluator, SuperNet
from dr_jax.search.genetic import genetic
from dr_jax.search.greedy import greedy
from dr_jax.search.hessian_ilp import (
  OBJECTIVES,
  hessian_ilp,
  quantization_errors,
  sensitivity_tables,
)
from dr_jax.search.log import Result, SearchLog
from dr_jax.search.options import check_options
from dr_jax.search.problem import Problem, Trial
from dr_jax.search.reinforce import reinforce

__all__ = [
  "OBJECTIVES",
  "SEARCHES",
  "Counts",
  "Evaluator",
  "Problem",
  "Result",
  "SearchLog",
  "SuperNet",
  "Trial",
  "check_options",
  "counts",
  "dnas",
  "edmips",
  "genetic",
  "greedy",
  "hessian_ilp",
  "inputs_of",
  "options_of",
  "proportional",
  "quantization_errors",
  "random",
  "reinforce",
  "sensitivity_tables",
  "uniform",
]

SEARCHES: dict[str, Callable[..., Result]] = {
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


def inputs_of(strategy: str) -> tuple[str, ...]:
  """Returns what a strategy takes besides problem, budgets and evaluate.

  >>> inputs_of("greedy"), inputs_of("hessian_ilp"), inputs_of("edmips")
  ((), ('sensitivity',), ('supernet',))
  """
  return _parameters(strategy, inspect.Parameter.POSITIONAL_OR_KEYWORD)[3:]


def options_of(strategy: str) -> tuple[str, ...]:
  """Returns the names of a strategy's options, without its seed.

  >>> options_of("greedy")
  ('per_cost',)
  """
  names = _parameters(strategy, inspect.Parameter.KEYWORD_ONLY)
  return tuple(name for name in names if name != "seed")


def _parameters(strategy, kind):
  parameters = inspect.signature(SEARCHES[strategy]).parameters
  return tuple(n for n, p in parameters.items() if p.kind == kind)
