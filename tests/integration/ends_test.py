"""How real processes end: signals at any time, readers that go away."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = (
  "--config=configs/digits.py",
  "--config.model.options.widths=(4,6,8)",
  "--config.quant.bits=(8,2)",
  "--config.pretrain.epochs=1",
  "--config.train.vectorize=sequential",
)


def command(workdir, *flags, epochs=1):
  return [
    *(sys.executable, "-m", "dr_jax.main", *FLAGS, f"--workdir={workdir}"),
    *(f"--config.train.epochs={epochs}", *flags),
  ]


def run(argv, **options):
  options = {
    "cwd": ROOT,
    "env": os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
  } | options
  return subprocess.Popen(argv, text=True, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("ends") / "run"
  process = run(command(workdir))
  _, err = process.communicate(timeout=500)
  assert process.returncode == 0, err
  return workdir


def closed_pipe():
  """The writing end of a pipe that nobody reads."""
  reader, writer = os.pipe()
  os.close(reader)
  return writer


@pytest.mark.parametrize("flags", [(), ("--help",)])
def test_standard_output_that_is_a_broken_pipe(finished, flags):
  writer = closed_pipe()
  process = run(command(finished, *flags), stdout=writer)
  os.close(writer)
  _, err = process.communicate(timeout=100)
  assert (process.returncode, err) == (141, "")


def test_standard_output_that_is_full(finished):
  with open("/dev/full", "w") as full:
    process = run(command(finished), stdout=full)
    _, err = process.communicate(timeout=100)
  assert process.returncode == 2
  assert err == (
    f"error: standard output: No space left on device; see {finished}\n"
  )


@pytest.mark.parametrize("descriptors", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_end_in_the_same_run(
  finished, tmp_path, descriptors
):
  script = f'"$@" {descriptors}'
  argv = ["bash", "-c", script, "bash", *command(tmp_path / "run")]
  process = run(argv)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0 and "Traceback" not in err
  summary = (tmp_path / "run" / "summary.json").read_text()
  assert summary.count("accuracy") == (
    (finished / "summary.json").read_text().count("accuracy")
  )


def test_standard_error_that_is_full_does_not_end_a_run(tmp_path):
  with open("/dev/full", "w") as full:
    process = run(command(tmp_path / "run"), stderr=full)
    out, _ = process.communicate(timeout=300)
  assert process.returncode == 0 and "workdir: " in out


@pytest.mark.parametrize("code", [0, 75])
def test_a_hangup_saves_and_the_same_command_resumes(tmp_path, code):
  workdir = tmp_path / "run"
  argv = command(workdir, f"--preempted_exit_code={code}", epochs=60)
  process = run(argv)
  log = workdir / "metrics.jsonl"
  for _ in range(3000):
    if log.exists() and "multi_precision" in log.read_text():
      break
    time.sleep(0.1)
  process.send_signal(signal.SIGHUP)
  _, err = process.communicate(timeout=100)
  assert process.returncode == code
  (line,) = [x for x in err.splitlines() if "stopped by SIGHUP" in x]
  assert line.endswith("saved; rerun the same command to resume")
  assert list((workdir / "multi_precision" / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize("moment", [0.3, 0.6, 1.0, 1.5, 2.2, 3.0])
def test_ctrl_c_while_the_program_loads_is_one_line(tmp_path, moment):
  process = run(
    command(tmp_path / "run", epochs=60),
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
  )
  time.sleep(moment)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=100)
  assert process.returncode == 130
  assert "Traceback" not in err
  assert err.splitlines()[-1].endswith("rerun the same command to resume")


def test_an_ascii_locale_writes_utf_8(finished):
  environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
  environment |= {"PYTHONUTF8": "0", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  process = run(command(finished), env=environment)
  out, err = process.communicate(timeout=100)
  assert (process.returncode, err) == (0, "")
  assert out.isascii() and "accuracy %" in out
