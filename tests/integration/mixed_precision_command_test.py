"""The mixed-precision command as a user starts it, killed and started again."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import quick_compilation

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = (
  "--config.model.options.depth=8",
  "--config.model.options.widths=(2,3,4)",
  "--config.quant.bits=(8,4,2)",
  "--config.pretrain.epochs=2",
  "--config.train.epochs=2",
  "--config.supernet.epochs=4",
  "--config.checkpoint_every=10",
  "--config.hessian.max_probes=8",
  '--config.search.strategies=("hessian_ilp","genetic","edmips","uniform")',
  "--config.search.budgets=(3.0,5.0)",
)


@pytest.fixture(scope="module")
def start():
  """Starts the command on a short job; compiled programs are shared."""
  environment = quick_compilation.environment()

  def command(workdir):
    config = "--config=configs/digits_mixed.py"
    return subprocess.Popen(
      [sys.executable, "-m", "dr_jax.main", config, f"--workdir={workdir}"]
      + list(FLAGS),
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return command


def _kill_when(process, reached):
  deadline = time.monotonic() + 300
  while not reached():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL


def _trials(workdir):
  return list((workdir / "search").glob("trials_both_*.jsonl"))


def _lines(workdir):
  return sum(path.read_text().count("\n") for path in _trials(workdir))


def _essence(workdir):
  """What a run has found, without the time that it took."""
  stages = json.loads((workdir / "summary.json").read_text())["stages"]
  times = ("seconds", "evaluation_seconds")
  rows = [
    {key: value for key, value in row.items() if key not in times}
    for row in stages["search"]["rows"]
  ]
  return (
    rows,
    stages["supernet"]["scores"],
    stages["export"]["scores"],
    stages["hessian"]["traces"],
  )


@pytest.mark.slow
def test_a_run_killed_in_the_supernet_and_in_a_search_ends_the_same(
  start, tmp_path
):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  process = start(whole)
  out, err = process.communicate(timeout=500)
  assert process.returncode == 0, err
  for strategy in ("hessian_ilp", "genetic", "edmips", "uniform"):
    assert strategy in out

  saved = killed / "supernet" / "checkpoints" / "20"
  _kill_when(start(killed), saved.exists)
  # One search has ended, and another one is on its way.
  _kill_when(start(killed), lambda: _lines(killed) >= 40)
  assert list((killed / "search" / "found").iterdir())
  process = start(killed)
  _, err = process.communicate(timeout=500)
  assert process.returncode == 0, err
  assert _essence(killed) == _essence(whole)
  (trials,) = _trials(killed)
  scored = [json.loads(line)[0] for line in trials.read_text().splitlines()]
  assert len(scored) == len({tuple(index) for index in scored})
