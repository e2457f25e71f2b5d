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

  def shardings(self, layout: Layout) -> Any:
    """Returns a TrainState of shardings, one for every array.

    Parameters and optimizer state are sharded as the layout says; every device
    has the rest whole.
    """
    whole: Any = replicated(layout, self)
    return whole._replace(
      params=layout.shardings(self.params),
      opt_state=layout.shardings(self.opt_state),
    )


def replicated(layout: Layout, tree: Any) -> Any:
  """Returns the shardings of a tree that every device has whole."""
  return jax.tree.map(lambda _: layout.replicated, tree)


def shard_state(layout: Layout, state: TrainState) -> TrainState:
  """Returns a state on the devices of a layout.

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
  """Returns arrays whole, on this process's default device.

  Args:
    layout: on which the arrays are; all of its processes must call this.
    tree: arrays of a state, such as (state.params, state.batch_stats).
  """
  # One function, so that a second call compiles nothing.
  whole = jax.jit(_same, out_shardings=layout.replicated)(tree)
  return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), whole)


def _same(tree):
  return tree
