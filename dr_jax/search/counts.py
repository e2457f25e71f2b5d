"""How much a search computes at most, before it does."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dr_jax.search.problem import Problem


class Counts(NamedTuple):
  """What a search computes.

  Attributes:
    evaluations: different assignments that it scores, at most.
    steps: training steps that it takes.
  """

  evaluations: int
  steps: int


def counts(
  strategy: Callable[..., Any],
  problem: Problem,
  budgets: Mapping[str, int],
  options: Mapping[str, Any],
) -> Counts:
  """Counts what a search would compute.

  Args:
    strategy: one of `SEARCHES`, or another one, of which nothing is known but
      that it scores no assignment twice.
    problem, budgets: what it would be given.
    options: its keyword arguments, those that differ from its defaults.
  """
  parameters = inspect.signature(strategy).parameters.values()
  defaults = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
  groups, lower = len(problem.groups()), len(problem.bits) - 1
  every = (lower + 1) ** groups
  count = _EVALUATIONS.get(strategy.__name__)
  given = defaults | dict(options)
  evaluations = every if count is None else count(problem, budgets, given)
  return Counts(min(evaluations, every), given.get("steps", 0) if groups else 0)


def _one(problem, budgets, options):
  del problem, budgets, options
  return 1


def _random(problem, budgets, options):
  del problem, budgets
  return options["draws"]


def _hessian_ilp(problem, budgets, options):
  """The optimum, and one neighbor per group and lower bit-width."""
  del budgets
  neighbors = len(problem.groups()) * (len(problem.bits) - 1)
  return min(1 + neighbors, options["max_candidates"] or 1 + neighbors)


def _greedy(problem, budgets, options):
  """The start, every group that can be lowered in each step, a last resort."""
  del options
  groups, lower = len(problem.groups()), len(problem.bits) - 1
  steps = _steps_to(problem, budgets)
  # After n steps there are n positions less to lower.
  moves = (min(groups, groups * lower - n) for n in range(steps))
  return 1 + sum(moves) + _may_rise(problem, budgets)


def _steps_to(problem, budgets):
  """Steps after which any way down is within the budgets."""
  most = len(problem.groups()) * (len(problem.bits) - 1)
  if _may_rise(problem, budgets):
    return most
  needed = [0]
  for name, limit in budgets.items():
    excess = problem.cost(problem.start(0))[name] - limit
    # The way that saves least.
    saved = itertools.accumulate(sorted(_saved(problem, name)), initial=0)
    needed.append(next((n for n, s in enumerate(saved) if s >= excess), most))
  return max(needed)


def _saved(problem, name):
  """What each lowering of a group by one position saves."""
  table = np.asarray(problem.costs[name])
  for group in problem.groups():
    yield from (-np.diff(table[list(group)].sum(0))).tolist()


def _may_rise(problem, budgets):
  """Whether fewer bits may cost more, as a measured latency does."""
  return any(min(_saved(problem, name), default=0) < 0 for name in budgets)


def _genetic(problem, budgets, options):
  del problem, budgets
  children = options["crossover"] + options["mutation"]
  if options["predictor"]:
    children = min(options["scored"], options["pool"] * children)
  return options["population"] + (options["generations"] - 1) * children


def _reinforce(problem, budgets, options):
  del problem, budgets
  return options["episodes"] + (options["reference"] is None)


_EVALUATIONS: dict[str, Callable[..., int]] = {
  "hessian_ilp": _hessian_ilp,
  "greedy": _greedy,
  "genetic": _genetic,
  "edmips": _one,
  "dnas": _one,
  "reinforce": _reinforce,
  "uniform": _one,
  "random": _random,
  "proportional": _one,
}
