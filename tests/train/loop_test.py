"""Tests of the loop: NaN, interruption, resumption."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.checkpoint import Checkpoints
from dr_jax.metrics import MetricsWriter
from dr_jax.train import InterruptedRun, Loop, NonFiniteError, TrainState


def _state():
  return TrainState(
    step=jnp.int32(0),
    params={"w": jnp.zeros(2)},
    opt_state={"m": jnp.zeros(2)},
    batch_stats={"mean": jnp.zeros(1)},
    key=jax.random.key(0),
    memory={},
  )


class _Batches:
  def stream(self, start):
    return ({"label": np.full(4, s, np.int32)} for s in itertools.count(start))


def _step(nan_at=None, poison=None, spoil=None):
  def step(state, batch):
    number = int(batch["label"][0]) + 1
    params = {"w": state.params["w"] + number}
    losses = jnp.array([1.0, jnp.nan if number == nan_at else 2.0])
    if number == poison:
      params = {"w": params["w"] * jnp.inf}
    opt_state = {"m": jnp.full(2, jnp.nan if number == spoil else 0.0)}
    state = state._replace(params=params, opt_state=opt_state)
    return state._replace(step=state.step + 1), losses

  return step


def _loop(tmp_path, checkpoints, metrics=None, **options):
  defaults = dict(
    stage="joint",
    steps=10,
    labels=(8, 2),
    step=_step(),
    batches=_Batches(),
    checkpoints=checkpoints,
    metrics=metrics,
    checkpoint_every=4,
    log_every=5,
  )
  return Loop(**(defaults | options))


def test_a_nan_loss_names_step_and_bits_and_keeps_the_last_checkpoint(tmp_path):
  with Checkpoints(tmp_path / "c") as checkpoints:
    loop = _loop(tmp_path, checkpoints, step=_step(nan_at=7))
    message = "joint: loss is nan at step 7, 2 bits; the checkpoint of step 4"
    with pytest.raises(NonFiniteError, match=message):
      loop.run(_state())
    restored = checkpoints.restore(like=_state())
    assert int(restored.step) == 4
    np.testing.assert_array_equal(restored.params["w"], 1 + 2 + 3 + 4)


def test_an_infinite_parameter_is_never_saved(tmp_path):
  with Checkpoints(tmp_path / "c") as checkpoints:
    loop = _loop(tmp_path, checkpoints, step=_step(poison=8))
    with pytest.raises(NonFiniteError, match="after step 8; .* step 4 is kept"):
      loop.run(_state())
    assert checkpoints.latest() == 4


def test_a_signal_saves_a_checkpoint_and_a_second_run_ends_the_same(tmp_path):
  calls = iter([None, None, "SIGTERM"])
  with Checkpoints(tmp_path / "c") as checkpoints:
    loop = _loop(tmp_path, checkpoints, interrupted=lambda: next(calls, None))
    with pytest.raises(InterruptedRun, match="SIGTERM at step 3 of 10"):
      loop.run(_state())
    assert checkpoints.latest() == 3
    resumed = checkpoints.restore(like=_state())
    state = _loop(tmp_path, checkpoints).run(resumed)
  whole = _loop(tmp_path, None).run(_state())
  np.testing.assert_array_equal(state.params["w"], whole.params["w"])
  assert int(state.step) == 10


def test_metrics_hold_the_mean_loss_of_each_bit_width(tmp_path):
  with MetricsWriter(tmp_path / "m.jsonl") as metrics:
    _loop(tmp_path, None, metrics).run(_state())
  records = [json.loads(x) for x in (tmp_path / "m.jsonl").open()]
  losses = [
    (r["step"], r["bits"], r["value"]) for r in records if r["name"] == "loss"
  ]
  assert losses == [(5, 8, 1.0), (5, 2, 2.0), (10, 8, 1.0), (10, 2, 2.0)]


def test_a_spoilt_optimizer_is_not_saved(tmp_path):
  with Checkpoints(tmp_path / "c") as checkpoints:
    loop = _loop(tmp_path, checkpoints, step=_step(spoil=8))
    message = "its optimizer is NaN or infinite after step 8; .* step 4 is kept"
    with pytest.raises(NonFiniteError, match=message):
      loop.run(_state())
    assert checkpoints.latest() == 4
