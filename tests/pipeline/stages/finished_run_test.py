"""Tests of a directory with a finished mixed-precision run."""

import shutil

import pytest
from mixed_job import config

from dr_jax import hessian, pipeline
from dr_jax.config import ConfigError
from dr_jax.pipeline import training
from dr_jax.train import InterruptedRun


def test_a_finished_run_repeats_nothing(finished, monkeypatch):
  workdir, summary = finished

  def never(*args, **kwargs):
    raise AssertionError("trained or estimated again")

  monkeypatch.setattr(hessian, "trace", never)
  monkeypatch.setattr(training, "train_phase", never)
  assert pipeline.run(config(), workdir) == summary


def test_copied_checkpoints_of_other_bits_raise_an_error(finished, tmp_path):
  workdir = tmp_path / "run"
  bits = (8, 5, 2)  # As many, so that every array has the same shape.
  with pytest.raises(InterruptedRun):
    pipeline.run(
      config(quant={"bits": bits}), workdir, interrupted=lambda: "SIGTERM"
    )
  for stage in ("pretrain", "multi_precision"):
    shutil.rmtree(workdir / stage, ignore_errors=True)
    shutil.copytree(finished[0] / stage, workdir / stage)
  (workdir / "multi_precision" / "result.json").unlink()
  with pytest.raises(
    ConfigError,
    match=r"multi_precision/network\.json: .*bits is \[8, 4, 2\] there, \[8, 5",
  ):
    pipeline.run(config(quant={"bits": bits}), workdir)


@pytest.mark.parametrize(
  "name", ["config.json", "supernet/result.json", "hessian/result.json"]
)
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_is_named_in_the_error(copied, name, content):
  (copied / name).write_text(content)
  with pytest.raises(
    ConfigError, match=rf"{name} is damaged: .*; (use a new|delete it)"
  ):
    pipeline.run(config(), copied)
