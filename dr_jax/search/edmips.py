"""EdMIPS: a softmax over bit-widths, trained with the weights.

m = softmax(a); weights and logits learn from the same batches. See
`differentiable` for the loss. CVPR 2020, arXiv 2004.05795.
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
  check_options,
)
from dr_jax.search.problem import Problem


def edmips(
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
  checkpoint_every: Count = 50,
) -> Result:
  """Searches by a softmax over bit-widths.

  Returned is the most probable assignment within the budgets: the argmax of
  every layer where that fits, else its exact projection. It takes a single
  evaluation, but also `steps` training steps, each of which quantizes to all
  candidates; these count as seconds only.

  Args:
    problem, budgets, evaluate: what to assign, {cost: limit}, and the scores.
    supernet: what to train, in a copy.
    seed: has no effect, unless the network itself draws (dropout).
    steps: batches to train on.
    learning_rate: of the weights, Adam.
    logit_learning_rate: of the logits, Adam.
    strength: what exceeding a budget by all of it costs, in nats of
      cross-entropy; several budgets add up.
    checkpoint_every: steps between checkpoints in `supernet.directory`.

  Raises:
    ValueError: for a wrong option, and as `Problem.check`.
    train.NonFiniteError: if the loss or a parameter becomes NaN or infinite.

  References:
    arXiv 2004.05795, section 4.
  """
  check_options(edmips, locals())
  options = Options(
    seed=seed,
    steps=steps,
    learning_rate=learning_rate,
    logit_learning_rate=logit_learning_rate,
    strength=strength,
    checkpoint_every=checkpoint_every,
  )
  return search_by_gradient(
    "edmips", problem, budgets, evaluate, supernet, options
  )
