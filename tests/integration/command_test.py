"""Tests of the command as a user starts it: real processes.

Signals, kills, full disks and damage are in kills_test, exit codes in
exit_codes_test.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import quick_compilation
import safetensors.numpy
from forked_command import ForkedCommand

from dr_jax import deploy, nn

ROOT = pathlib.Path(__file__).parents[2]
SHORT = (
  "--config.model.options.depth=8",
  "--config.model.options.widths=(4,6,8)",
  "--config.quant.bits=(8,2)",
  "--config.pretrain.epochs=2",
  "--config.train.epochs=2",
  "--config.train.vectorize=sequential",
  "--config.checkpoint_every=10",
)


def arguments(workdir, flags):
  """The short job's, and flags that may replace some of them."""
  return ["--config=configs/digits.py", f"--workdir={workdir}", *SHORT, *flags]


@pytest.fixture(scope="module")
def start():
  """Starts the command on a short job; compiled programs are shared."""
  environment = quick_compilation.environment()

  def command(workdir, *flags):
    return subprocess.Popen(
      [sys.executable, "-m", "dr_jax.main", *arguments(workdir, flags)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return command


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
  """Runs the short job's command to its end, without the start of Python."""
  command = ForkedCommand(tmp_path_factory.mktemp("forked"))
  yield lambda workdir, *flags: command(*arguments(workdir, flags))
  command.close()


@pytest.fixture(scope="module")
def finished(forked, tmp_path_factory):
  """A directory in which the short job ran to its end, and what it printed."""
  workdir = tmp_path_factory.mktemp("run") / "whole"
  code, out, err = forked(workdir)
  assert code == 0, err
  return workdir, out, err


def test_the_job_prints_a_table_and_writes_what_it_showed(finished):
  workdir, out, err = finished
  summary = json.loads((workdir / "summary.json").read_text())
  export = summary["stages"]["export"]["scores"]
  for bits in ("8", "2"):
    assert f"{export[bits]['accuracy']:.2f}" in out
  assert summary["environment"]["jax"]
  assert "examples/s" in err and "left" in err
  names = {
    json.loads(x)["name"]
    for x in (workdir / "metrics.jsonl").read_text().splitlines()
  }
  assert names == {
    "loss",
    "scale_gradient_norm",
    "examples_per_second",
    "test_accuracy",
    "test_loss",
  }


def test_the_artifact_scores_exactly_as_the_trained_network(
  finished,
):
  stages = json.loads((finished[0] / "summary.json").read_text())["stages"]
  for bits in ("8", "2"):
    trained = stages["multi_precision"]["scores"][bits]["accuracy"]
    assert stages["export"]["scores"][bits]["accuracy"] == trained
  # Not the accuracies alone: every last bit of the cross-entropies.
  assert stages["export"]["scores"] == stages["multi_precision"]["scores"]
  model = deploy.load(finished[0] / "export" / "model", bits=2)
  assert {row.bits for row in nn.layer_table(model)} == {2}


def test_a_second_start_finds_everything_done(finished, forked):
  workdir, out, _ = finished
  before = (workdir / "metrics.jsonl").read_bytes()
  again = forked(workdir)
  assert again.code == 0, again.err
  assert again.out == out
  assert (workdir / "metrics.jsonl").read_bytes() == before


def _steps(workdir, stage):
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return 0
  records = [
    json.loads(line)
    for line in path.read_text().splitlines(keepends=True)
    if line.endswith("\n")
  ]
  return max((r["step"] for r in records if r["stage"] == stage), default=0)


@pytest.mark.slow
def test_a_second_process_in_the_same_directory_ends_with_an_error(
  start, forked, finished, tmp_path
):
  workdir = tmp_path / "shared"
  first = start(workdir)
  while _steps(workdir, "pretrain") < 1:
    assert first.poll() is None, first.communicate()[1]
    time.sleep(0.01)
  code, _, err = forked(workdir)
  first.kill()
  first.communicate()
  assert code == 2
  assert "is in use by another process" in err
  assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    (
      "--config.train.epohcs=5",
      "field must be one of alrs, curriculum.* got 'epohcs'",
    ),
    ("--config.trian.epochs=5", "field must be one of check.* got 'trian'"),
    (
      "--config.train.epohcs=5 --bogus=1",
      "field must be one of .* got 'epohcs'",
    ),
    ("--config.train.epochs.x=5", "train.epochs is a value, not a group"),
    ("--config.train.epochs=many", "epochs=many must be an integer$"),
    ("--config.train.keep_best=maybe", "best=maybe must be true or false$"),
    ("--config.train.warmup=1%", "warmup=1% must be a number$"),
    ("--config.quant.bits=(8,9)", r"quant.bits must be .* got \(8, 9\)"),
    ("--config.quant.bits=(2,8)", r"quant.bits must be .* got \(2, 8\)"),
    ("--config.quant.bits=(8,1)", r"quant.bits must be .* got \(8, 1\)"),
    (
      "--config.data.batch_size=5000",
      "data.batch_size must be in 1..1257, .* got 5000",
    ),
    ("--config.data.name=mnist", "data.name must be one of digits"),
    ("--config.model.name=vgg", "model.name must be one of"),
    ("--config.model.options.depth=9", "depth must be 6 n"),
    ("--config.train.alrs=fast", "train.alrs must be one of"),
    ("--config.train.vectorize=vmap", "train.vectorize must not be 'vmap'"),
    ("--config.quant.weight=dorefa", "quant.weight must be one of"),
    (
      "--config.quant.weight=lsq_activation",
      "quant.weight must be one of .* got 'lsq_activation'",
    ),
    (
      "--config.quant.activation=lsq",
      "quant.activation must be one of none, .* got 'lsq'",
    ),
    ("--config.quant.norm=swichable", "quant.norm must be one of"),
    (
      "--config.model.options.widths=(4,6)",
      r"widths must be three.* got \(4, 6\)",
    ),
    ("--config=configs/digits.py:4x2", "bit-widths.* got '4x2'"),
    ("--config.seed=3", "seed is 0 there, 3 here"),
    ("--workdir=/dev/null/run", "^error: workdir /dev/null/run cannot be wr"),
    ("--preempted_exit_code=256", "preempted_exit_code=256.*\\[0, 255\\]"),
    ("--confg=3", "confg"),
    ("--config=configs/nothing.py", "nothing.py' is not a file"),
    ("--config=configs", "'configs' is not a file"),
    ("--config=LICENSE", "^error: LICENSE, line 1: IndentationError: unexp"),
    (
      "--config=dr_jax/__init__.py",
      "__init__.py must define a function get_config",
    ),
    ("--config=configs/digits.py:x", "digits.py, line .*: ValueError: argum"),
    ("--config.train", "config.train"),
    ("--config.data=3", "config.data=3: .* is not a dict"),
    ("--config.train={}", "config.train is provided after"),
    ("--config.seed", "Missing value for flag --config.seed"),
    ("--config.seed=", "config.seed= must be an integer$"),
    ("--config.seed=1.5", "config.seed=1.5 must be an integer$"),
    ("--config.seed.=1", "config.seed.=1"),
    ("--config.=1", "config.=1"),
    ("--config.quant[=1", "field must be one of .*'quant\\['"),
    ("--config.quant[0]=1", "field must be one of .*'quant\\[0\\]'"),
    ("--config.quant.bits[0]=1", "one of .*'bits\\[0\\]'"),
    ("--noconfig.seed", "config.seed"),
    ("--config.quant.bits=(8,", "config.quant.bits=.*parsing"),
    ("--config.quant.bits=" + "(" * 999, "quant.bits"),
    ("--config.method=x --config.method.y=1", "config.method"),
    ("--config.train.epochs=1 --config.train={}", "config.train"),
    ("--undefok=x --y=1", "'y'"),
    ("--flagfile=/nothing", "/nothing"),
    ("-config.seed=x", "config.seed=x"),
    ("stray", "arguments must be flags, --name=value, got 'stray'"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(finished, forked, flag, message):
  workdir = finished[0]
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
  code, out, err = forked(workdir, *flag.split(" "))
  assert (code, out) == (2, ""), err
  lines = err.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), err
  assert re.search(message, lines[0]), err
  after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
  assert after == before


def test_the_last_of_two_flags_counts_for_tuples_too(finished, forked):
  bits = [f"--config.quant.bits={bits}" for bits in ("(4,)", "6", "(8,2)")]
  code, out, err = forked(finished[0], *bits)
  assert (code, out) == (0, finished[1]), err


def test_a_damaged_artifact_is_named_and_left_as_it_is(
  finished, forked, tmp_path
):
  workdir = tmp_path / "damaged"
  shutil.copytree(finished[0], workdir)
  path = workdir / "export" / "model" / "model.safetensors"
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  code, _, err = forked(workdir)
  assert code == 2
  assert err.count("\n") == 1 and "model.safetensors" in err
  assert path.read_bytes() == data
  shutil.rmtree(path.parent)
  code, _, err = forked(workdir)
  assert code == 2 and "No such file" in err


def test_a_directory_with_other_files_is_left_as_it_is(forked, tmp_path):
  (tmp_path / "thesis.txt").write_text("precious")
  code, _, err = forked(tmp_path)
  assert code == 2 and "is not empty and holds no run" in err
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_tensors_of_the_artifact_are_finite(finished):
  path = finished[0] / "export" / "model" / "model.safetensors"
  for name, value in safetensors.numpy.load_file(path).items():
    assert np.isfinite(value.astype(np.float32)).all(), name
