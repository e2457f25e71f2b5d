"""Tests of the stages, in this process, on the smallest job there is."""

import dataclasses
import json
import os
import shutil
import types

import pytest

from dr_jax import pipeline
from dr_jax.config import ConfigError, from_dict
from dr_jax.deploy import ArtifactError
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.pipeline import check_stages, disk_bytes
from dr_jax.pipeline.workdir import Workdir

_STAGES = ("pretrain", "multi_precision", "separate", "export")


def _config(stages=_STAGES, epochs=1):
  return from_dict(
    {
      "stages": stages,
      "model": {"name": "resnet", "options": {"depth": 8, "widths": (2, 3, 4)}},
      "quant": {"bits": (8, 2)},
      "devices": {"data": 1},
      "pretrain": {"epochs": epochs, "optimizer": "sgd", "learning_rate": 0.1},
      "train": {"epochs": epochs, "vectorize": "sequential"},
    }
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "whole"
  return workdir, pipeline.run(_config(), workdir)


@pytest.mark.slow
def test_separate_trains_one_more_network_per_bit_width(
  finished,
):
  workdir, summary = finished
  stages = summary["stages"]
  assert list(stages) == [
    "pretrain", "multi_precision", "separate/8", "separate/2", "export"
  ]  # fmt: skip
  for bits in ("8", "2"):
    assert list(stages[f"separate/{bits}"]["scores"]) == [bits]
  records = [
    json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  seen = {(r["stage"], r["bits"]) for r in records if r["name"] == "loss"}
  assert seen == {
    ("pretrain", None),
    ("multi_precision", 8),
    ("multi_precision", 2),
    ("separate/8", 8),
    ("separate/2", 2),
  }


@pytest.mark.slow
def test_training_in_integers_gives_the_scores_of_training_in_floats(
  finished, tmp_path
):
  _, floats = finished
  config = _config(stages=("pretrain", "multi_precision"))
  quantized = dataclasses.replace(config.quant, backend="carrier")
  summary = pipeline.run(dataclasses.replace(config, quant=quantized), tmp_path)
  for bits, score in summary["stages"]["multi_precision"]["scores"].items():
    expected = floats["stages"]["multi_precision"]["scores"][bits]
    # Float sums have another order, and every step depends on all before.
    assert score["loss"] == pytest.approx(expected["loss"], rel=0.05)


def test_a_backend_that_the_quantizers_rule_out_is_an_error_before_training(
  tmp_path,
):
  config = _config()
  quantized = dataclasses.replace(
    config.quant, backend="integer", activation="none"
  )
  with pytest.raises(ConfigError, match="quant.backend 'integer' cannot"):
    pipeline.run(dataclasses.replace(config, quant=quantized), tmp_path)
  assert not (tmp_path / "pretrain").exists()


@pytest.mark.parametrize("epochs", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_compiles_its_steps_once_whatever_their_number(
  tmp_path, compiled, epochs
):
  config = _config(stages=("pretrain", "multi_precision"), epochs=epochs)
  pipeline.run(config, tmp_path)
  records = [
    json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  steps = max(r["step"] for r in records if r["stage"] == "multi_precision")
  assert steps == epochs * 1257 // 128
  # The float network's, and one that serves both bit-widths.
  assert compiled["jit(step)"] == 1
  assert compiled["jit(run_pass)"] == 1
  # One per network that is scored.
  assert compiled["jit(counts)"] == 2


def test_a_full_disk_is_an_error_before_anything_is_trained(
  tmp_path, monkeypatch
):
  usage = types.SimpleNamespace(free=100_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  message = (
    "its disk has 0.1 MiB free, but pretrain, multi_precision, separate, "
    "export may take"
  )
  workdir = tmp_path / "a" / "run"
  with pytest.raises(ConfigError, match=message):
    pipeline.run(_config(), workdir)
  # Nothing is in the way of another configuration, that needs less.
  assert not workdir.parent.exists()


def test_a_disk_that_was_filled_since_is_an_error_before_a_stage_is_trained(
  tmp_path, monkeypatch
):
  free = iter([2**40, 100_000])
  monkeypatch.setattr(
    shutil, "disk_usage", lambda path: types.SimpleNamespace(free=next(free))
  )
  with pytest.raises(ConfigError, match="0.1 MiB free, but pretrain may take"):
    pipeline.run(_config(), tmp_path)
  assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_of_too_many_steps_is_an_error_before_it_starts(tmp_path):
  config = from_dict({"data": {"batch_size": 1}, "devices": {"data": 1}})
  recipe = dataclasses.replace(config.train, epochs=10**7)
  with pytest.raises(
    ConfigError, match=r"train.epochs must make less than 2\^31 steps, got 10"
  ):
    pipeline.run(dataclasses.replace(config, train=recipe), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_what_does_not_fit_in_memory_is_an_error_before_it_is_made(
  tmp_path, monkeypatch
):
  pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 100_000}
  monkeypatch.setattr(os, "sysconf", pages.get)
  config = from_dict({"devices": {"data": 1}})
  with pytest.raises(ConfigError, match="model.options must .* memory, got"):
    RunContext(config, tmp_path)
  pages["SC_PHYS_PAGES"] = 500
  with pytest.raises(ConfigError, match="data.batch_size must .* memory, got"):
    RunContext(config, tmp_path)


def test_the_users_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert Workdir("~/run").path == tmp_path / "run"
  model = dataclasses.replace(_config().model, weights="~/w.safetensors")
  config = dataclasses.replace(_config(), model=model)
  with pytest.raises(ConfigError, match="model.weights='~/w.safetensors'"):
    pipeline.run(config, "~/run")
  assert not list(tmp_path.iterdir())


def test_space_is_estimated_for_every_phase_and_separate_network(tmp_path):
  def sizes(**train):
    config = _config()
    recipe = dataclasses.replace(config.train, **train)
    config = dataclasses.replace(config, train=recipe)
    return disk_bytes(RunContext(config, tmp_path))

  plain = sizes()
  assert plain["separate"] == 2 * plain["multi_precision"]
  # Adam has two numbers for each parameter, momentum one.
  assert plain["multi_precision"] > plain["pretrain"]
  phases = sizes(curriculum="bit_mixer", sampling="random")
  assert phases["multi_precision"] == 3 * plain["multi_precision"]
  untrained = sizes(curriculum="post_training")
  assert untrained["multi_precision"] == 0


def test_a_run_writes_less_than_its_estimate(finished):
  workdir, _ = finished
  asked = disk_bytes(RunContext(_config(), workdir))
  assert set(asked) == {"pretrain", "multi_precision", "separate", "export"}
  for stage, size in asked.items():
    files = (workdir / stage).rglob("*")
    written = sum(path.stat().st_size for path in files if path.is_file())
    # Of three checkpoints asked for, two are there; the rest is small here.
    assert 0 < written < size, stage


def test_a_kill_between_the_last_number_and_the_result_repeats_nothing(
  finished,
):
  workdir, _ = finished
  result = workdir / "separate" / "2" / "result.json"
  before = json.loads(result.read_text())["scores"]
  numbers = sorted((workdir / "metrics.jsonl").read_text().splitlines())
  result.unlink()
  pipeline.run(_config(), workdir)
  assert json.loads(result.read_text())["scores"] == before
  again = sorted((workdir / "metrics.jsonl").read_text().splitlines())
  assert again == numbers


def test_an_artifact_with_other_scores_than_the_network_raises_an_error(
  finished,
):
  workdir, _ = finished
  trained = workdir / "multi_precision" / "result.json"
  before = trained.read_text()
  other = json.loads(before)
  other["scores"]["2"]["loss"] += 1e-6
  trained.write_text(json.dumps(other))
  (workdir / "export" / "result.json").unlink()
  with pytest.raises(ArtifactError, match="export/model scores .* but the tr"):
    pipeline.run(_config(), workdir)
  assert not (workdir / "export" / "result.json").exists()
  trained.write_text(before)
  pipeline.run(_config(), workdir)


def test_a_kill_while_the_configuration_is_written_leaves_a_usable_directory(
  tmp_path,
):
  (tmp_path / "config.json.partial").write_text("{")
  job = Workdir(tmp_path)
  with job.claim(_config()):
    pass
  assert json.loads((tmp_path / "config.json").read_text())["name"] == "run"


def test_a_damaged_configuration_is_named_in_the_error(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(
    ConfigError, match="config.json is damaged: .*; use a new directory"
  ):
    pipeline.run(_config(), tmp_path)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"stages": ("train",)}, "stages must be of pretrain, .*got 'train'"),
    ({"stages": ("export",)}, "stages: export must come after multi_precision"),
    (
      {"stages": ("pretrain", "hessian", "multi_precision")},
      "stages: hessian must come after multi_precision",
    ),
    (
      {"stages": ("export",), "model": {"weights": "w"}},
      "stages: export must come after multi_precision",
    ),
    (
      {"stages": ("multi_precision", "hessian")},
      "stages: hessian must come after pretrain",
    ),
    (
      {"stages": ("pretrain", "search"), "data": {"holdout": 0.2}},
      "stages: search must come after supernet",
    ),
    (
      {"stages": ("pretrain", "multi_precision", "supernet", "hessian")},
      "stages: supernet must come after hessian",
    ),
  ],
)
def test_a_stage_without_what_it_needs_raises_an_error(
  values, message, tmp_path
):
  with pytest.raises(ConfigError, match=message):
    pipeline.run(from_dict(values), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_given_weights_replace_the_float_stage():
  stages = ("multi_precision", "hessian")
  weights = {"weights": "resnet18.safetensors"}
  check_stages(from_dict({"stages": stages, "model": weights}))
