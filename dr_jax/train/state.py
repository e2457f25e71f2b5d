"""What a training run carries from step to step, as plain arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dr_jax.nn import Functional
from dr_jax.train import distill


class TrainState(NamedTuple):
  """All that a run needs to go on, as one pytree of arrays.

  Attributes:
    step: int32, batches consumed; also the position in the data.
    params: trainable arrays, nested dict.
    opt_state: optimizer state.
    batch_stats: running statistics, nested dict.
    key: PRNG key of the run; step t draws from `fold_in(key, t)`.
    memory: what a distillation scheme carries from step to step.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  batch_stats: Any
  key: jax.Array
  memory: Any


def init_state(
  network: Functional,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  *,
  distillation: str = "none",
  num_classes: int = 0,
) -> TrainState:
  """Returns the state at step 0, with its own copies of all arrays.

  Args:
    network, optimizer: as for `make_step`.
    key: PRNG key of the run.
    distillation: as for `make_step`.
    num_classes: width of the logits, which some schemes carry memory for.
  """
  params, batch_stats = jax.tree.map(
    jnp.copy, (network.params, network.batch_stats)
  )
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    batch_stats=batch_stats,
    key=key,
    memory=distill.get(distillation).init(num_classes),
  )
