"""A step that XLA optimizes reaches the numbers of a quickly compiled one.

Other tests of steps compile quickly in both runs; see `tests/conftest.py`.
"""

import jax
import numpy as np
import optax
import pytest
import quick_compilation
import training_network as net

from dr_jax import nn
from dr_jax.benchmarks.throughput import MODES
from dr_jax.runtime import sharding
from dr_jax.train import make_optimizer, make_trainer

# Programs take seconds to compile.
pytestmark = pytest.mark.slow


def numbers(schedule, vectorize, layout=None):
  """What two steps reach: parameters, statistics of norms, losses, norms."""
  network = nn.functional(net.quantized())
  trainer = make_trainer(
    network,
    make_optimizer("sgd", param_labels=network.param_labels, weight_decay=1e-3),
    optax.constant_schedule(0.05),
    schedule=schedule,
    vectorize=vectorize,
    alrs="relative",
    layout=layout,
  )
  place = layout.shard_batch if layout else lambda batch: batch
  state, logged = trainer.init(jax.random.key(0)), []
  for number in range(2):
    state, *seen = trainer.logged_step(state, place(net.batch(number)))
    logged.append(seen)
  start = (network.params, network.batch_stats)
  reached = jax.tree.map(np.asarray, (state.params, state.batch_stats, logged))
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), reached[:2], start)
  assert max(jax.tree.leaves(moved)) > 0.01
  return reached


@pytest.mark.parametrize(
  ("schedule", "vectorize", "devices"),
  [
    *((*mode, 1) for mode in MODES),
    *(("alternate", "sequential", 4), ("accumulate", "vmap", 4)),
  ],
)
def test_optimized_steps_reach_the_numbers_of_quickly_compiled_ones(
  schedule, vectorize, devices
):
  layout = None
  if devices > 1:
    layout = sharding.layout(data=devices, parameters="sharded")
    layout = layout._replace(smallest=16)
  optimized = numbers(schedule, vectorize, layout)
  with quick_compilation.used():
    quick = numbers(schedule, vectorize, layout)
  # Sums of float32 in another order; rounding to codes amplifies some.
  for (path, a), b in zip(
    jax.tree.leaves_with_path(optimized), jax.tree.leaves(quick), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5, err_msg=str(path))
