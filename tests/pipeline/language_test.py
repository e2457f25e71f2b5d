"""A language model through the stages, on a text of the test's own."""

import json
import math

import pytest

from dr_jax import deploy, nn, pipeline, report
from dr_jax.config import ConfigError, from_dict
from dr_jax.runtime.tasks import TASKS

TEXT = b"The quick brown fox jumps over the lazy dog. " * 40


def values(path, **changes):
  return {
    "stages": ("pretrain", "multi_precision", "export", "report"),
    "data": {
      "name": "text",
      "path": str(path),
      "length": 16,
      "batch_size": 16,
    },
    "model": {
      "name": "transformer",
      "options": {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1},
    },
    "quant": {"bits": (8, 2)},
    "devices": {"data": 1},
    "pretrain": {"epochs": 6, "learning_rate": 0.02},
    "train": {"epochs": 1, "vectorize": "sequential"},
    **changes,
  }


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text")
  for split in ("train", "test"):
    (path / split).mkdir()
    (path / split / "fox.txt").write_bytes(TEXT)
  return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  return workdir, pipeline.run(from_dict(values(text)), workdir)


def test_a_run_ends_with_bits_per_byte_at_every_bit_width(finished):
  workdir, summary = finished
  assert summary["task"] == "language"
  assert (
    json.loads((workdir / "summary.json").read_text())["task"] == "language"
  )
  scores = summary["stages"]["export"]["scores"]
  assert list(scores) == ["8", "2"]
  whole = summary["stages"]["pretrain"]["scores"]["float"]
  bits = TASKS["language"].value(whole)
  assert bits == pytest.approx(whole["loss"] / math.log(2))
  # An untrained one needs 8 bits for a byte, the order of 28 letters 4.8.
  assert bits < 4
  assert TASKS["language"].value(scores["8"]) < bits + 1


def test_an_artifact_is_the_network_with_every_projection_at_every_bit_width(
  finished,
):
  workdir, _ = finished
  artifact = deploy.open(workdir / "export" / "model")
  name, options = artifact.manifest["architecture"]
  assert name == "transformer"
  assert (options["vocabulary"], options["context"]) == (256, 16)
  table = nn.layer_table(artifact.load())
  assert {row.name for row in table} >= {
    f"blocks/0/{layer}"
    for layer in ("attention/key", "attention/out", "gated/up", "gated/down")
  }


@pytest.mark.slow
def test_searches_show_bits_per_byte_of_what_they_found(text, tmp_path):
  stages = ("pretrain", "multi_precision", "hessian", "supernet", "search")
  config = from_dict(
    values(
      text,
      stages=(*stages, "export", "report"),
      data=values(text)["data"] | {"holdout": 0.3},
      supernet={"epochs": 1, "vectorize": "sequential"},
      hessian={"images": 32, "batch_size": 32, "rel_stderr": 0.5},
      search={"strategies": ("uniform", "hessian_ilp"), "budgets": (8.0, 2.0)},
    )
  )
  summary = pipeline.run(config, tmp_path / "run")
  rows = summary["stages"]["search"]["rows"]
  table = report.search_table(rows, summary["task"])
  assert table.columns[2].header == "bits per byte"
  uniform = {row["budget"]: row["test"] for row in rows[::2]}
  scores = summary["stages"]["export"]["scores"]
  assert uniform == {8.0: scores["8"], 2.0: scores["2"]}
  assert (tmp_path / "run" / "report" / "pareto.png").exists()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model": {"name": "resnet20"}},
      "model.name must be one of transformer with data.name='text', got "
      "'resnet20'",
    ),
    (
      {"data": {"name": "digits"}},
      "model.name must be one of resnet, .* with data.name='digits', got "
      "'transformer'",
    ),
  ],
)
def test_a_network_for_another_task_is_an_error_before_training(
  text, tmp_path, changes, message
):
  config = from_dict(values(text, **changes))
  with pytest.raises(ConfigError, match=message):
    pipeline.run(config, tmp_path / "run")
