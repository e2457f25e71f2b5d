"""What a training run carries from step to step, as plain arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dr_jax.nn import Functional
from dr_jax.runtime.processes import from_first
from dr_jax.runtime.sharding import Layout
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


def shardings(layout: Layout, tree: Any) -> Any:
  """Where the arrays of a state, or of what its steps hand on, live.

  Parameters, their gradients and their optimizer state are where the layout
  says, a teacher's answers with the batch, all else on every device.
  """

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path[:1], simple=True)
    if name in ("params", "opt_state"):
      return layout.shardings(leaf)
    return layout.batch if name == "teacher" else layout.replicated

  return jax.tree.map_with_path(sharding, tree)


def place(layout: Layout, state: TrainState) -> TrainState:
  """A state on the devices of a layout.

  Every process has the first one's; all must call this.
  """
  keys = jax.random.key_data(state.key)
  plain = from_first(state._replace(key=keys))
  placed = jax.tree.map(
    lambda leaf, sharding: jax.make_array_from_callback(
      np.shape(leaf), sharding, np.asarray(leaf).__getitem__
    ),
    plain,
    shardings(layout, plain),
  )
  impl = jax.random.key_impl(state.key)
  return placed._replace(key=jax.random.wrap_key_data(placed.key, impl=impl))


def collect(layout: Layout, tree: Any) -> Any:
  """Arrays of a state, whole and on this process's default device."""
  whole = jax.jit(lambda t: t, out_shardings=layout.replicated)(tree)
  return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), whole)
