"""DNAS: a Gumbel-softmax over bit-widths, with falling temperature.

m = softmax((a + Gumbel noise) / T), resampled for every batch; weights learn
from even batches and logits from odd ones. See `differentiable` for the loss.
arXiv 1812.00090.
"""

from __future__ import annotations

from collections.abc import Mapping

from dr_jax.search.differentiable import Options, search_by_gradient
from dr_jax.search.evaluator import Evaluator, SuperNet
from dr_jax.search.log import Result
from dr_jax.search.options import (
  Count,
  Factor,
  Rate,
  Seed,
  Temperature,
  check_options,
)
from dr_jax.search.problem import Problem


def dnas(
  problem: Problem,
  budgets: Mapping[str, int],
  evaluate: Evaluator,
  supernet: SuperNet,
  *,
  seed: Seed = 0,
  steps: Count = 200,
  learning_rate: Rate = 1e-3,
  logit_learning_rate: Rate = 0.05,
  strength: Factor = 0.3,
  temperature: Temperature = 5.0,
  final_temperature: Temperature = 0.5,
  checkpoint_every: Count = 50,
) -> Result:
  """Searches by samples of a Gumbel-softmax with falling temperature.

  Weights learn from batches 0, 2, ..., logits from 1, 3, ...; the temperature
  falls exponentially over the search. The cost enters as in `edmips`: the
  published loss multiplies the cross-entropy by a power of the logarithm of
  the cost instead.

  Args:
    problem, budgets, evaluate, supernet, learning_rate, logit_learning_rate,
      strength, checkpoint_every: as for `edmips`.
    seed: decides the noise.
    steps: batches to train on, weights and logits together.
    temperature, final_temperature: at the first and at the last step.

  Raises:
    As `edmips`.

  References:
    arXiv 1812.00090, section 4.
  """
  check_options(dnas, locals())
  options = Options(
    seed=seed,
    steps=steps,
    learning_rate=learning_rate,
    logit_learning_rate=logit_learning_rate,
    strength=strength,
    checkpoint_every=checkpoint_every,
    temperature=temperature,
    final_temperature=final_temperature,
    drawn=True,
  )
  return search_by_gradient(
    "dnas", problem, budgets, evaluate, supernet, options
  )
