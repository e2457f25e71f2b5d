"""Tests of the stages, in this process, on the smallest job there is."""

import json

import pytest

from dr_jax import pipeline
from dr_jax.config import ConfigError, from_dict
from dr_jax.deploy import ArtifactError
from dr_jax.main import table
from dr_jax.workdir import Workdir


@pytest.fixture(autouse=True)
def strict_numerics():
  """Training runs as users run it."""
  yield


def _config():
  return from_dict(
    {
      "stages": ("pretrain", "multi_precision", "separate", "export"),
      "model": {"name": "resnet", "options": {"depth": 8, "widths": (2, 3, 4)}},
      "quant": {"bits": (8, 2)},
      "devices": {"data": 1},
      "pretrain": {"epochs": 1, "optimizer": "sgd", "learning_rate": 0.1},
      "train": {"epochs": 1, "vectorize": "sequential"},
    }
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "whole"
  return workdir, pipeline.run(_config(), workdir)


def test_separate_trains_one_network_per_bit_width_beside_the_joint_one(
  finished,
):
  workdir, summary = finished
  stages = summary["stages"]
  assert set(stages) == {
    "pretrain", "multi_precision", "separate/8", "separate/2", "export"
  }  # fmt: skip
  for bits in ("8", "2"):
    assert list(stages[f"separate/{bits}"]["scores"]) == [bits]
  records = [json.loads(x) for x in (workdir / "metrics.jsonl").open()]
  seen = {(r["stage"], r["bits"]) for r in records if r["name"] == "loss"}
  assert seen == {
    ("pretrain", None),
    ("multi_precision", 8),
    ("multi_precision", 2),
    ("separate/8", 8),
    ("separate/2", 2),
  }


def test_the_table_shows_separate_runs_also_without_a_joint_one(finished):
  _, summary = finished
  column = table(summary).columns[-1]
  scores = [
    summary["stages"][f"separate/{b}"]["scores"][b]["accuracy"]
    for b in ("8", "2")
  ]
  assert list(column.cells)[1:] == [f"{score:.2f}" for score in scores]
  del summary["stages"]["multi_precision"], summary["stages"]["export"]
  assert list(table(summary).columns[-1].cells)[1:] == [
    f"{score:.2f}" for score in scores
  ]


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


def test_an_artifact_that_scores_otherwise_than_the_network_is_an_error(
  finished,
):
  workdir, _ = finished
  trained = workdir / "multi_precision" / "result.json"
  before = trained.read_text()
  other = json.loads(before)
  other["scores"]["2"]["loss"] += 1e-6
  trained.write_text(json.dumps(other))
  (workdir / "export" / "result.json").unlink()
  with pytest.raises(ArtifactError, match="export/model: scores .* but the tr"):
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


def test_a_damaged_configuration_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ConfigError, match="config.json: damaged, no JSON"):
    pipeline.run(_config(), tmp_path)
