"""Genetic search over assignments, with or without a predictor.

Every generation crosses and mutates the best assignments so far. Children are
checked against the budgets before they are scored, never after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np

from dr_jax.search.assignments import Genes
from dr_jax.search.evaluator import Evaluator
from dr_jax.search.log import Result, SearchLog
from dr_jax.search.options import (
  Count,
  CountFrom0,
  Fraction,
  Seed,
  check_options,
)
from dr_jax.search.problem import Index, Problem, Trial


def genetic(
  problem: Problem,
  budgets: Mapping[str, int],
  evaluate: Evaluator,
  *,
  seed: Seed = 0,
  population: Count = 50,
  parents: Count = 10,
  generations: Count = 20,
  crossover: CountFrom0 = 25,
  mutation: CountFrom0 = 25,
  probability: Fraction = 0.1,
  tries: Count = 10,
  predictor: bool = False,
  pool: Count = 10,
  scored: Count = 10,
) -> Result:
  """Evolves assignments within the budgets; returns the best that was scored.

  The first generation is random. A child that is over a budget or was scored
  before is drawn again, then repaired as in `baselines.random`; one that is
  known even then is left out.

  With a predictor (MultiQuant) a linear model of the score, one coefficient
  per layer and bit-width, is fitted to all trials. It ranks `pool` times as
  many children, and only the best `scored` of a generation are scored. The
  paper's predictor is not public; this one is a reading of its idea, and
  claims no parity.

  Args:
    problem, budgets, evaluate: what to assign, {cost: limit}, and the scores.
    seed: of all draws.
    population: assignments in the first generation.
    parents: best assignments so far, from which children come.
    generations: their number, the first one included.
    crossover: children per generation with each layer from one of two parents.
    mutation: children per generation with some layers of a parent resampled.
    probability: of a layer to be resampled.
    tries: times that a child is drawn before it is repaired.
    predictor: whether to rank children before they are scored.
    pool: with a predictor, children drawn for each without it.
    scored: with a predictor, children scored per generation.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: for a wrong budget or option.

  References:
    Single Path One-Shot, arXiv 1904.00420, algorithm 1; MultiQuant, IJCAI 2022.
  """
  check_options(genetic, locals())
  log = SearchLog(problem, budgets, evaluate)
  breed = _Breed(
    genes=Genes(problem, budgets),
    tries=tries,
    probability=probability,
    rng=np.random.Generator(np.random.PCG64(seed)),
  )
  for index in breed.random(population):
    log(index)
  for _ in range(generations - 1):
    best = [trial.index for trial in sorted(log, key=problem.rank)[:parents]]
    known = {trial.index for trial in log}
    times = pool if predictor else 1
    children = breed.crossed(best, times * crossover, known)
    children += breed.mutated(best, times * mutation, known.union(children))
    if predictor:
      children = _promising(problem, breed.genes, log, children)[:scored]
    for index in children:
      log(index)
  return log.result()


@dataclasses.dataclass(frozen=True)
class _Breed:
  """Draws different new assignments within the budgets."""

  genes: Genes
  tries: int
  probability: float
  rng: np.random.Generator

  def random(self, number: int) -> list[Index]:
    """Assignments without parents."""
    return self._new(number, set(), lambda: self.genes.draw(self.rng))

  def crossed(
    self, parents: Sequence[Index], number: int, known: Set[Index]
  ) -> list[Index]:
    """Every gene from one of two parents, which may be the same."""
    genes = [self.genes.of(index) for index in parents]

    def child():
      one, other = self.rng.integers(len(genes), size=2)
      first = self.rng.random(genes[one].shape) < 0.5
      return np.where(first, genes[one], genes[other])

    return self._new(number, known, child)

  def mutated(
    self, parents: Sequence[Index], number: int, known: Set[Index]
  ) -> list[Index]:
    """A parent with some genes resampled."""
    genes = [self.genes.of(index) for index in parents]

    def child():
      parent = genes[self.rng.integers(len(genes))]
      resampled = self.rng.random(parent.shape) < self.probability
      return np.where(resampled, self.genes.draw(self.rng), parent)

    return self._new(number, known, child)

  def _new(self, number, known, child) -> list[Index]:
    """At most `number` assignments, none of them known or twice."""
    found: dict[Index, None] = {}
    for _ in range(number):
      genes = np.zeros(0)
      for _ in range(self.tries):
        genes = child()
        index = self.genes.index(genes)
        new = index not in known and index not in found
        if new and self.genes.fits(genes):
          break
      else:
        index = self.genes.index(self.genes.repair(genes, self.rng))
      if index not in known:
        found[index] = None
    return list(found)


def _promising(
  problem: Problem, genes: Genes, trials: Iterable[Trial], children: list[Index]
) -> list[Index]:
  """Sorts children by the score that a ridge regression predicts."""
  from sklearn.linear_model import Ridge

  pairs = [(trial.index, problem.rank(trial)[0]) for trial in trials]
  pairs = [(index, score) for index, score in pairs if np.isfinite(score)]
  if not pairs or not children:
    return children

  def one_hot(indices):
    positions = np.array([genes.of(index) for index in indices])
    hot = positions[:, :, None] == np.arange(len(problem.bits))
    return hot.reshape(len(positions), -1).astype(np.float64)

  indices, scores = zip(*pairs, strict=True)
  model = Ridge().fit(one_hot(indices), np.array(scores))
  predicted = model.predict(one_hot(children))
  return [children[n] for n in np.argsort(predicted, kind="stable")]
