"""Training on data sets on disk: interrupted, resumed, damaged, missing."""

import json
import pathlib
import subprocess
import sys

import pytest
import quick_compilation

from dr_jax import pipeline, train
from dr_jax.config import ConfigError, from_dict

ROOT = pathlib.Path(__file__).parents[2]


def config(**options):
  """Six steps of four and a half batches an epoch, a checkpoint every two."""
  return from_dict(
    {
      "stages": ["pretrain"],
      "log_every": 1,
      "checkpoint_every": 2,
      "data": {
        "batch_size": 8,
        "augment": "random_resized_crop",
        "image_size": 8,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        **options,
      },
      "model": {"name": "resnet", "options": {"depth": 8, "widths": (4, 4, 4)}},
      "pretrain": {"epochs": 2, "learning_rate": 0.01},
    }
  )


def losses(workdir):
  """Every loss and score that a run wrote, in order."""
  records = map(
    json.loads, (workdir / "metrics.jsonl").read_text().splitlines()
  )
  return [
    (r["step"], r["name"], r["value"])
    for r in records
    if r["name"] != "examples_per_second"
  ]


def interrupt_after(steps):
  calls = iter([None] * (steps - 1) + ["SIGTERM"])
  return lambda: next(calls, None)


@pytest.mark.slow
def test_a_run_on_a_folder_resumes_in_the_middle_of_an_epoch(
  make_folder, tmp_path
):
  path = str(make_folder())
  alone = config(name="folder", path=path)
  pipeline.run(alone, tmp_path / "whole")
  want = losses(tmp_path / "whole")
  assert [step for step, name, _ in want if name == "loss"] == [*range(1, 7)]
  # 24 examples, 8 a step: stopped after 4 steps of two epochs of 3.
  with pytest.raises(train.InterruptedRun, match="SIGTERM after step 4 of 6"):
    pipeline.run(alone, tmp_path / "cut", interrupted=interrupt_after(4))
  pipeline.run(alone, tmp_path / "cut")
  assert losses(tmp_path / "cut") == want
  workers = config(name="folder", path=path, workers=2)
  pipeline.run(workers, tmp_path / "workers")
  assert losses(tmp_path / "workers") == want


def test_a_run_on_tfds_counts_the_images_that_cannot_be_read(
  prepared, tmp_path
):
  torn = config(
    name="tfds", dataset="torn", path=prepared, on_decode_error="skip"
  )
  with pytest.warns(UserWarning) as warned:
    pipeline.run(torn, tmp_path / "run")
  messages = [str(w.message) for w in warned if "read" in str(w.message)]
  named = [m for m in messages if m.startswith("torn/1.0.0 train ")]
  assert len(named) == len(set(named)) == 2
  (summary,) = (m for m in messages if m.startswith("pretrain: "))
  assert summary.startswith(
    "pretrain: unreadable images: 2; the next readable one took their place 4"
  )


FILE = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({values!r})
"""


def command(tmp_path, values):
  """Runs the command; returns exit code and what it wrote to stderr."""
  file = tmp_path / "config.py"
  file.write_text(FILE.format(values=values))
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "dr_jax.main",
      f"--config={file}",
      f"--workdir={tmp_path / 'run'}",
    ],
    cwd=ROOT,
    env=quick_compilation.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  return done.returncode, done.stderr


def test_the_command_names_a_truncated_image_in_one_line(make_folder, tmp_path):
  path = make_folder()
  for number in range(1, 12):
    for file in (path / "train" / "cat").glob(f"{number:02}.*"):
      file.write_bytes(file.read_bytes()[:90])
  code, errors = command(
    tmp_path,
    {
      "stages": ("pretrain",),
      "data": {"name": "folder", "path": str(path), "batch_size": 8,
               "image_size": 8, "workers": 1},
      "model": {"name": "resnet", "options": {"depth": 8}},
    },
  )  # fmt: skip
  assert code == 2, errors
  (line,) = (x for x in errors.splitlines() if x.startswith("error: "))
  assert f"{path}/train/cat/" in line and " cannot be read (" in line
  assert "Traceback" not in errors and "leaked" not in errors


def test_the_command_says_how_to_prepare_what_is_missing(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  options = {"name": "tfds", "dataset": "cifar10", "path": str(tmp_path)}
  code, errors = command(tmp_path, {"data": options | {"batch_size": 8}})
  assert code == 2
  assert errors.count("\n") == 1, errors
  assert errors.startswith("error: data.dataset 'cifar10' is not prepared")
  assert f"tfds build cifar10 --data_dir={tmp_path} --file_format" in errors
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"augment": "autoaugment"},
      "data.augment must be one of none",
    ),
    ({"image_size": 0}, "data.image_size must be >= 1 with"),
    ({"image_size": -1}, "data.image_size must be >= 0, got -1"),
    ({"workers": -1}, "data.workers must be >= 0, got -1"),
    (
      {"on_decode_error": "ignore"},
      "data.on_decode_error must be one",
    ),
    ({"classes": 0}, "data.classes must be >= 1, got 0"),
    ({"examples": 0}, "data.examples must be >= 1, got 0"),
    ({"channels": 4}, "data.channels must be one of 1, 3, got 4"),
    ({"mean": ("x",)}, "data.mean must be a tuple of int or float"),
    ({"std": (1.0, 0.0)}, "data.std must be >= 1e-06, got 0.0"),
    ({"name": "digits"}, "data.augment must be 'none' with"),
  ],
)
def test_a_field_that_is_wrong_is_one_line(options, message):
  with pytest.raises(ConfigError, match=message):
    config(**({"name": "synthetic"} | options))


def test_digits_take_no_options_that_would_change_nothing():
  for field, value in (("workers", 2), ("mean", (0.5,)), ("image_size", 8)):
    with pytest.raises(ConfigError, match=f"data.{field} must be .*'digits'"):
      from_dict({"data": {field: value}})
