"""Several steps in one call equal as many calls of one step."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_network as net
from flax import nnx

from dr_jax import nn, quant
from dr_jax.checkpoint.checkpoints import Checkpoints
from dr_jax.runtime.metrics import MetricsWriter
from dr_jax.train import (
  InterruptedRun,
  Loop,
  NonFiniteError,
  make_optimizer,
  make_trainer,
)


@functools.cache
def _trainer(vectorize="unroll"):
  """Of two dense layers, with bits drawn and a rate that falls."""
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.Linear(4, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 3, rngs=rngs)
  )
  network = nn.functional(
    nn.quantize(
      model,
      weight=quant.double_rounding(net.BITS),
      activation=quant.lsq_activation(net.BITS),
      sample=np.ones((2, 4), np.float32),
      skip=(),
    )
  )
  return make_trainer(
    network,
    make_optimizer("adam", param_labels=network.param_labels),
    optax.linear_schedule(0.1, 0.0, 10),
    vectorize=vectorize,
    alrs="eta",
    sampling="mixed",
  )


class _Batches:
  def __getitem__(self, step):
    image = np.random.default_rng(step).normal(size=(8, 4))
    return {
      "image": image.astype(np.float32),
      "label": np.arange(8, dtype=np.int32) % 3,
    }


def _run(path, *, calls=None, vectorize="unroll", step=None, **options):
  """Runs ten steps to their end, also after interruptions; the last state."""
  trainer = _trainer(vectorize)
  sizes = []

  def counted(state, batch):
    sizes.append(len(batch) if isinstance(batch, tuple) else 1)
    return (step or trainer.logged_step)(state, batch)

  like = state = trainer.init(jax.random.key(0))
  defaults = {"steps": 10, "checkpoint_every": 6, "log_every": 3}
  with Checkpoints(path / "c") as checkpoints:
    while True:
      with MetricsWriter(path / "m.jsonl") as metrics:
        metrics.resume("joint", int(state.step))
        loop = Loop(
          stage="joint",
          labels=trainer.labels,
          step=counted,
          batches=_Batches(),
          checkpoints=checkpoints,
          metrics=metrics,
          show_progress=False,
          **(defaults | options),
        )
        try:
          state = loop.run(state)
          break
        except InterruptedRun:
          state = checkpoints.restore(like=like)
  if calls is not None:
    assert sizes == calls
  records = map(json.loads, (path / "m.jsonl").read_text().splitlines())
  return state, [r for r in records if r["name"] != "examples_per_second"]


def _assert_equal(a, b, rtol=0.0):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = map(jax.random.key_data, (x, y))
    np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("vectorize", ["unroll", "sequential"])
def test_steps_in_one_call_are_those_of_many_calls(tmp_path, vectorize):
  expected, records = _run(tmp_path / "one", calls=[1] * 10)
  state, got = _run(
    tmp_path / "several",
    # Up to the checkpoint of step 6, and to the end.
    calls=[4, 1, 1, 4],
    steps_per_call=4,
    vectorize=vectorize,
  )
  # XLA promises no equal bits of different programs.
  _assert_equal(state, expected, rtol=1e-4)
  where = [(r["step"], r["bits"], r["name"]) for r in got]
  assert where == [(r["step"], r["bits"], r["name"]) for r in records]
  np.testing.assert_allclose(
    [r["value"] for r in got], [r["value"] for r in records], rtol=1e-4
  )


def test_a_run_stopped_after_any_call_ends_in_the_same_bits(tmp_path):
  options = {"steps_per_call": 2, "checkpoint_every": 5}
  # Step 5 ends with a checkpoint, so that calls start from there again.
  calls = [2, 2, 1, 2, 2, 1]
  whole, records = _run(tmp_path / "whole", calls=calls, **options)
  asked = itertools.count(1)
  stopped, again = _run(
    tmp_path / "stopped",
    calls=calls,
    interrupted=lambda: "SIGTERM" if next(asked) % 2 else None,
    **options,
  )
  _assert_equal(stopped, whole)
  losses = [[r for r in of if r["name"] == "loss"] for of in (records, again)]
  assert losses[0] == losses[1]


def test_no_validation_falls_within_a_call(tmp_path):
  scored = []

  class Scorer:
    def is_due(self, step):
      return step in (3, 8)

    def resume(self, step, metrics):
      return False

    def score(self, step, state, metrics):
      scored.append((step, int(state.step)))
      return ""

  # Up to steps 3, 6 (a checkpoint), 8 and 10.
  calls = [3, 3, 1, 1, 1, 1]
  _run(tmp_path, calls=calls, steps_per_call=3, validation=Scorer())
  assert scored == [(3, 3), (8, 8)]


def test_a_nan_within_a_call_names_its_step(tmp_path):
  def step(state, batch):
    count = len(batch) if isinstance(batch, tuple) else 1
    state = state._replace(step=state.step + count)
    losses = np.ones((count, 1), np.float32)
    if int(state.step) == 8:
      losses[2] = np.nan
    return state, losses if count > 1 else losses[0], {}

  message = "loss is nan at step 7, mixed bits; the checkpoint of step 4 is"
  with pytest.raises(NonFiniteError, match=message):
    _run(tmp_path, step=step, steps_per_call=4, checkpoint_every=4)
