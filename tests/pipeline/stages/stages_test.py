"""Tests of what derives from `STAGES`: a stage is one value."""

import pytest
from flax import nnx

from dr_jax import models, pipeline
from dr_jax.config import ConfigError, from_dict
from dr_jax.pipeline.stages import STAGES, Stage


def test_every_stage_needs_stages_that_are_listed_before_it():
  names = list(STAGES)
  for position, stage in enumerate(STAGES.values()):
    assert stage.name == names[position] and stage.help
    assert set(stage.needs) <= set(names[:position])


def config(*stages):
  model = {"name": "resnet", "options": {"depth": 8, "widths": (2, 2, 2)}}
  return from_dict({"stages": stages, "model": model, "devices": {"data": 1}})


@pytest.fixture
def start():
  """A float network that replaces the stage pretrain."""
  options = {"depth": 8, "widths": (2, 2, 2), "channels": 1}
  return models.build("resnet", rngs=nnx.Rngs(0), num_classes=10, **options)


@pytest.fixture
def add_stage(monkeypatch):
  """Adds a stage "count" that counts its calls; returns the count."""

  def add(**options):
    calls = []

    def run(context):
      calls.append(context)
      context.workdir.finish("count", 0.0, images=len(context.data.train))

    stage = Stage(
      name="count", help="count images", run=run, needs=("pretrain",), **options
    )
    monkeypatch.setitem(STAGES, stage.name, stage)
    return calls

  return add


@pytest.mark.parametrize("single_process", [False, True])
def test_a_new_stage_runs_once_and_is_in_the_summary(
  add_stage, start, tmp_path, single_process
):
  calls = add_stage(single_process=single_process)
  for _ in range(2):
    summary = pipeline.run(config("pretrain", "count"), tmp_path, start=start)
    assert summary["stages"]["count"]["images"] == 1257
  assert len(calls) == 1


def test_a_new_stage_must_come_after_what_it_needs(add_stage, tmp_path):
  add_stage()
  with pytest.raises(ConfigError, match="stages: count must come after pretra"):
    pipeline.run(config("count"), tmp_path / "run")
  with pytest.raises(ConfigError, match="must be of pretrain, .*, count, got"):
    pipeline.run(config("pretrain", "counts"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_space_of_a_new_stage_is_checked_before_any_stage_runs(
  add_stage, start, tmp_path
):
  calls = add_stage(disk_bytes=lambda run: 2**60)
  with pytest.raises(ConfigError, match="free, but pretrain, count may take"):
    pipeline.run(config("pretrain", "count"), tmp_path, start=start)
  assert not calls


def test_the_check_of_a_new_stage_precedes_every_file(add_stage, tmp_path):
  def check(run):
    raise ConfigError("count must be possible")

  add_stage(check=check)
  with pytest.raises(ConfigError, match="count must be possible"):
    pipeline.run(config("pretrain", "count"), tmp_path / "run")
  assert not (tmp_path / "run").exists()
