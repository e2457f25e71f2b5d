"""Tests of validation while a stage trains, on the smallest job there is."""

import json
import math

import jax
import numpy as np
import pytest

from dr_jax import nn, pipeline, train
from dr_jax.config import ConfigError, from_dict
from dr_jax.pipeline import validation
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.pretrain import float_network
from dr_jax.runtime import sharding, tree
from dr_jax.runtime.metrics import MetricsWriter
from dr_jax.train import TrainState

EPOCHS, STEPS = 4, 6  # 48 images an epoch, 8 a step


def values(stages=("pretrain",), **recipe):
  recipe = {"epochs": EPOCHS, "vectorize": "sequential", **recipe}
  return {
    "stages": stages,
    "model": {"name": "resnet", "options": {"depth": 8, "widths": (2, 2, 2)}},
    "data": {
      **{"name": "synthetic", "image_size": 8, "classes": 3},
      **{"batch_size": 8, "examples": 64, "holdout": 0.25},
    },
    "quant": {"bits": (8, 2)},
    "devices": {"data": 1},
    # So fast that the last state is not the best.
    "pretrain": {"learning_rate": 3.0, "optimizer": "sgd", **recipe},
    "train": {"learning_rate": 0.02, **recipe},
  }


VALIDATED = {"validation_every": 1, "keep_best": True}


def records(workdir, stage):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [r for r in map(json.loads, lines) if r["stage"] == stage]


def named(workdir, stage, name):
  """{(step, bits): value} of a name; each is there once."""
  found = [r for r in records(workdir, stage) if r["name"] == name]
  by_step = {(r["step"], r["bits"]): r["value"] for r in found}
  assert len(by_step) == len(found)
  return by_step


def trained(config, workdir):
  """Fingerprint of the network that a finished stage pretrain restores."""
  network = nn.functional(float_network(RunContext(config, workdir)))
  return tree.fingerprint((network.params, network.batch_stats))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that was never stopped."""
  config = from_dict(values(**VALIDATED))
  workdir = tmp_path_factory.mktemp("validated")
  return config, workdir, pipeline.run(config, workdir, profile=2)


def test_every_epoch_has_scores_and_the_best_state_is_kept(whole):
  config, workdir, _ = whole
  accuracy = named(workdir, "pretrain", "validation_accuracy")
  ends = [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
  assert list(accuracy) == [(step, None) for step in ends]
  best = max(ends, key=lambda step: (accuracy[step, None], step))
  assert best != ends[-1]  # else this test shows nothing
  kept = {int(p.name) for p in (workdir / "pretrain" / "best").iterdir()}
  assert max(kept) == best
  run = RunContext(config, workdir)
  network = float_network(run)
  split = nn.functional(network)
  score = train.make_evaluate(split)(
    split.params, split.batch_stats, 0, run.epoch(run.held_out)
  )
  assert score.accuracy == accuracy[best, None]


def test_training_is_the_same_with_and_without_validation(whole, tmp_path):
  _, workdir, _ = whole
  pipeline.run(from_dict(values()), tmp_path)
  name = ("pretrain", "loss")
  assert named(tmp_path, *name) == named(workdir, *name)
  assert not (tmp_path / "pretrain" / "best").exists()
  assert {r["name"] for r in records(tmp_path, "pretrain")} == {
    *("loss", "examples_per_second", "test_accuracy", "test_loss")
  }


def test_a_stage_that_trains_leaves_the_profile_asked_for(whole):
  _, workdir, _ = whole
  assert (workdir / "profile/pretrain/perfetto_trace.json.gz").stat().st_size


class Killed(BaseException):
  """Stands for the end of the process."""


@pytest.mark.parametrize(
  ("owner", "method", "call"),
  [
    # Before the second score; after its best state; with half of it written.
    (validation.Validation, "score", 2),
    (validation.Validation, "_write", 2),
    (validation.Best, "offer", 3),
    # Of the last step, whose checkpoint says that all is trained.
    (validation.Validation, "score", EPOCHS),
  ],
)
def test_a_run_that_is_killed_in_a_validation_ends_as_if_it_were_not(
  whole, tmp_path, monkeypatch, owner, method, call
):
  config, workdir, summary = whole
  plain, calls = getattr(owner, method), []

  def kill(*args):
    calls.append(args)
    if len(calls) == call:
      raise Killed
    return plain(*args)

  with monkeypatch.context() as patch:
    patch.setattr(owner, method, kill)
    with pytest.raises(Killed):
      pipeline.run(config, tmp_path)
  resumed = pipeline.run(config, tmp_path)
  stage = "pretrain"
  assert (
    resumed["stages"][stage]["scores"] == summary["stages"][stage]["scores"]
  )
  assert trained(config, tmp_path) == trained(config, workdir)
  for name in ("loss", *validation.NAMES):
    assert named(tmp_path, stage, name) == named(workdir, stage, name)


@pytest.mark.slow
def test_one_program_validates_all_bit_widths(tmp_path, compiled):
  config = from_dict(values(("pretrain", "multi_precision"), **VALIDATED))
  pipeline.run(config, tmp_path)
  # For each stage one that validates, and one of the deployed network.
  assert compiled["jit(counts)"] == 4
  assert compiled["jit(_same)"] <= 2
  accuracy = named(tmp_path, "multi_precision", "validation_accuracy")
  assert set(accuracy) == {
    (STEPS * epoch, bits) for epoch in range(1, EPOCHS + 1) for bits in (8, 2)
  }


def state(value):
  return TrainState(
    step=jax.numpy.int32(0),
    params={"w": jax.numpy.full(2, value)},
    opt_state={},
    batch_stats={},
    key=jax.random.key(0),
    memory={},
  )


def test_the_best_state_is_the_latest_of_least_cost(tmp_path):
  layout = sharding.layout(devices=jax.devices()[:1])

  def opened():
    return validation.Best(tmp_path / "best", layout, state(0.0))

  best = opened()
  assert best.applied_to(state(7.0)).params["w"][0] == 7
  costs = [3.0, math.nan, 1.0, 2.0, 1.0, 1.5]
  for step, cost in enumerate(costs, 1):
    best.offer(step, cost, state(float(step)))
  assert best.step == 5
  best.close()
  best = opened()
  best.resume(6)
  best.offer(6, 1.1, state(6.0))
  np.testing.assert_array_equal(best.applied_to(state(0.0)).params["w"], 5)
  # The run resumes from step 4: what it is about to do again is forgotten.
  best.resume(5)
  assert best.step == 3
  best.offer(5, 1.1, state(5.0))
  assert best.step == 3
  best.close()


@pytest.mark.parametrize(
  ("group", "changed", "message"),
  [
    (
      "data",
      {"holdout": 0.0},
      "data.holdout must be > 0 with pretrain.validation_every=1, got 0.0",
    ),
    (
      "pretrain",
      {"validation_every": 0},
      "pretrain.keep_best must be False with pretrain.validation_every=0",
    ),
    (
      "train",
      {"curriculum": "bit_mixer"},
      "train.validation_every must be 0 with train.curriculum='bit_mixer'",
    ),
  ],
)
def test_fields_that_do_not_fit_validation_raise_an_error(
  group, changed, message
):
  given = values(**VALIDATED)
  with pytest.raises(ConfigError, match=message):
    from_dict({**given, group: {**given[group], **changed}})


def test_numbers_of_one_step_can_be_written_again(tmp_path):
  with MetricsWriter(tmp_path / "m.jsonl") as metrics:
    for step in (1, 2):
      metrics.write("a", step, {"x": 1.0, "y": 2.0}, bits=8)
    metrics.drop("a", 2, ("x",))
    metrics.write("a", 2, {"x": 3.0}, bits=8)
  with MetricsWriter(tmp_path / "m.jsonl") as metrics:
    assert metrics.values("a", 1, "x") == {8: 1.0}
    assert metrics.values("a", 2, "x") == {8: 3.0}
    assert metrics.values("a", 2, "y") == {8: 2.0}
