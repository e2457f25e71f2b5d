"""Problems with known answers for the tests of searches.

Every layer does a damage of its own at every bit-width, and damages add up:

  loss = sum_l damage[l, i_l],   accuracy = 100 exp(-loss)

More bits never harm. Damages are multiples of 2^-20, so that sums are exact.
"""

import dataclasses
import inspect
import itertools
import math
from typing import Any

import numpy as np

from dr_jax import allocate, nn
from dr_jax.search import Evaluator, Problem
from dr_jax.train import Score

BITS = (8, 6, 4, 2)


class Stop(Exception):
  """What interrupts a search in these tests."""


class Additive:
  """Scores assignments by added damage, and keeps what it was asked.

  Attributes:
    damage: float64 [L, B].
    calls: assignments it was asked to score, in order.
    limit: number of calls after which it raises Stop, or None.
  """

  def __init__(self, damage, limit=None):
    self.damage, self.limit = damage, limit
    self.calls = []

  def __call__(self, index):
    if self.limit is not None and len(self.calls) == self.limit:
      raise Stop
    self.calls.append(tuple(map(int, index)))
    loss = self.damage[np.arange(len(index)), index].sum()
    return Score(accuracy=100 * math.exp(-loss), loss=float(loss))


def table(layers, bits, seed=0):
  """Layers of different sizes; parameters and MACs are not in proportion."""
  rng = np.random.default_rng(seed)
  rows = []
  for layer in range(layers):
    c_in, c_out = map(int, rng.integers(2, 17, 2))
    pixels = int(rng.integers(1, 10))
    rows.append(
      nn.LayerRow(
        name=f"block{layer}/conv",
        kind="conv",
        shape=(3, 3, c_in, c_out),
        stride=1,
        parameters=9 * c_in * c_out,
        macs=9 * c_in * c_out * pixels,
        signed=False,
        bits=bits[0],
      )
    )
  return nn.LayerTable(rows)


def damage(layers, bits, seed=0):
  """Damages [L, B]: 0 at the highest bit-width, about 3x more per step."""
  rng = np.random.default_rng(seed + 1000)
  steps = np.exp(rng.normal(0, 1, (layers, len(bits))))
  steps *= 3.0 ** np.arange(len(bits)) / 300
  steps[:, 0] = 0
  return np.round(np.cumsum(steps, 1) * 2**20) / 2**20


@dataclasses.dataclass(frozen=True)
class Searchable(Problem):
  """A problem with what its searches are given besides budgets.

  Attributes:
    evaluate: an Evaluator, with its `score` as an attribute.
    sensitivity, supernet: for the searches that take them.
  """

  evaluate: Any = None
  sensitivity: Any = None
  supernet: Any = None


def search(strategy, problem, budgets, **options):
  """Runs a search with what it takes of a Searchable."""
  parameters = inspect.signature(strategy).parameters
  inputs = {
    name: getattr(problem, name)
    for name in ("evaluate", "sensitivity", "supernet")
    if name in parameters
  }
  return strategy(problem, budgets, **inputs, **options)


def problem(
  layers=6,
  bits=BITS,
  seed=0,
  path=None,
  *,
  score=None,
  interrupted=lambda: None,
  **fields,
):
  """A problem with additive damage.

  Args:
    layers, bits: its size.
    seed: of the layers and of the damage.
    path: where trials are kept.
    score: takes the place of the damage's own `Additive`.
    interrupted: of the Evaluator.
    **fields: of Searchable, such as ties, pinned, metric, sensitivity.

  Returns:
    A Searchable with the costs stored_bits, bops and sum_bits. Its `evaluate`
    has the attribute `score`: an `Additive`, unless another was given.
  """
  rows = table(layers, bits, seed)
  score = score or Additive(damage(layers, bits, seed))
  evaluate = Evaluator(score, path=path, interrupted=interrupted)
  evaluate.score = score
  costs = {
    "stored_bits": allocate.stored_bits([r.parameters for r in rows], bits),
    "bops": allocate.bops([r.macs for r in rows], bits),
    "sum_bits": allocate.mean_bits(layers, bits),
  }
  fields = {"costs": costs, "evaluate": evaluate, **fields}
  return Searchable(table=rows, bits=bits, **fields)


def budgets(problem, fraction=0.4, names=("stored_bits",)):
  """Budgets between the cheapest and the dearest assignment."""
  return {n: allocate.between(problem.costs[n], fraction) for n in names}


def assignments(problem):
  """All assignments that keep ties and pins, as tuples of positions."""
  groups = problem.groups()
  for positions in itertools.product(
    range(len(problem.bits)), repeat=len(groups)
  ):
    index = problem.start(0)
    for group, position in zip(groups, positions, strict=True):
      index[list(group)] = position
    yield tuple(map(int, index))


def best(problem, budgets):
  """The assignment of least damage within the budgets, by brute force."""
  damage = problem.evaluate.score.damage
  rows = np.arange(len(damage))
  fitting = (i for i in assignments(problem) if problem.fits(i, budgets))
  return min(fitting, key=lambda index: damage[rows, list(index)].sum())


def index_of(problem, result):
  """Positions of a result's allocation, as a tuple."""
  return tuple(map(int, result.allocation.index(problem.bits)))
