"""What a training run carries from step to step, as plain arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.runtime.processes import from_first
from dr_jax.runtime.sharding import Layout


class TrainState(NamedTuple):
  """All that a run needs to resume, as one pytree of arrays.

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

  def shardings(self, layout: Layout) -> TrainState:
    """Parameters and optimizer state as the layout says, others replicated."""
    return TrainState(
      step=layout.replicated,
      params=layout.shardings(self.params),
      opt_state=layout.shardings(self.opt_state),
      batch_stats=replicated(layout, self.batch_stats),
      key=layout.replicated,
      memory=replicated(layout, self.memory),
    )


def replicated(layout: Layout, tree: Any) -> Any:
  """The sharding of a tree that every device holds whole."""
  return jax.tree.map(lambda _: layout.replicated, tree)


def shard_state(layout: Layout, state: TrainState) -> TrainState:
  """A state on the devices of a layout.

  Every process gets the first one's arrays; all must call this.
  """
  keys = jax.random.key_data(state.key)
  plain = from_first(state._replace(key=keys))
  placed = jax.tree.map(
    lambda leaf, sharding: jax.make_array_from_callback(
      np.shape(leaf), sharding, np.asarray(leaf).__getitem__
    ),
    plain,
    plain.shardings(layout),
  )
  impl = jax.random.key_impl(state.key)
  return placed._replace(key=jax.random.wrap_key_data(placed.key, impl=impl))


def gather(layout: Layout, tree: Any) -> Any:
  """Arrays of a state, whole and on this process's default device."""
  whole = jax.jit(lambda t: t, out_shardings=layout.replicated)(tree)
  return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), whole)
