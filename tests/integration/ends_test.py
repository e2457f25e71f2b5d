"""How real processes end: signals at any time, readers that go away."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import quick_compilation

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
    "env": quick_compilation.environment(),
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


def wait_until(process, reached):
  """Waits until a running process has come so far."""
  deadline = time.monotonic() + 300
  while not reached():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.002)


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


def closing(descriptors, argv):
  """Starts a command without some of the standard descriptors."""
  return run(["bash", "-c", f'"$@" {descriptors}', "bash", *argv])


def test_a_run_without_descriptors_ends_as_another(finished, tmp_path):
  process = closing("<&- >&- 2>&-", command(tmp_path / "run"))
  process.communicate(timeout=300)
  assert process.returncode == 0
  summary = (tmp_path / "run" / "summary.json").read_text()
  assert summary.count("accuracy") == (
    (finished / "summary.json").read_text().count("accuracy")
  )


def test_a_table_without_standard_output_is_no_error(finished):
  process = closing(">&-", command(finished))
  _, err = process.communicate(timeout=300)
  assert (process.returncode, err) == (0, "")


def test_standard_error_that_is_full_does_not_end_a_run(tmp_path):
  with open("/dev/full", "w") as full:
    process = run(command(tmp_path / "run"), stderr=full)
    out, _ = process.communicate(timeout=300)
  assert process.returncode == 0 and "workdir: " in out


@pytest.mark.parametrize("code", [75])
def test_a_hangup_saves_and_the_same_command_resumes(tmp_path, code):
  workdir = tmp_path / "run"
  argv = command(workdir, f"--preempted_exit_code={code}", epochs=60)
  if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    pytest.skip("this run ignores the signal, as under nohup")
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


@pytest.mark.parametrize("moment", [0.3, 1.0, 2.2])
def test_ctrl_c_while_the_program_loads_is_one_line(tmp_path, moment):
  process = run(command(tmp_path / "run", epochs=60))
  time.sleep(moment)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=100)
  assert process.returncode == 130
  assert "Traceback" not in err
  assert err.splitlines()[-1].endswith("rerun the same command to resume")


@pytest.mark.parametrize("between", [0.05, 1.0])
def test_a_second_ctrl_c_at_any_moment_is_one_line(tmp_path, between):
  process = run(
    command(tmp_path / "run", "--config.checkpoint_every=2", epochs=60),
  )
  wait_until(
    process, (tmp_path / "run" / "multi_precision" / "checkpoints").exists
  )
  process.send_signal(signal.SIGINT)
  time.sleep(between)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=100)
  # By the signal itself, once Python has taken down its handlers.
  assert process.returncode in (130, -signal.SIGINT)
  assert not [x for x in err.splitlines() if x.startswith((" ", "Traceback"))]
  assert err.splitlines()[-1].endswith("rerun the same command to resume")


def test_output_that_ends_while_a_run_trains_does_not_end_it(tmp_path):
  writer = closed_pipe()
  process = run(command(tmp_path / "run"), stdout=writer, stderr=writer)
  os.close(writer)
  process.communicate(timeout=300)
  assert process.returncode == 141
  assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare here")
@pytest.mark.parametrize("home", [("-u", "HOME"), ("HOME=/proc/1/nothing",)])
def test_a_user_without_a_home_runs(finished, home):
  alone = ["unshare", "--user", "--map-user=54321"]
  if subprocess.run([*alone, "true"], capture_output=True).returncode:
    pytest.skip("no other user can be had here")
  kept = ("-u", "JAX_COMPILATION_CACHE_DIR", "-u", "XDG_CACHE_HOME")
  process = run([*alone, "env", *kept, *home, *command(finished)])
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0 and "Traceback" not in err
  assert out.endswith(f"workdir: {finished}\n")


def test_an_ascii_locale_writes_utf_8(finished):
  environment = quick_compilation.environment() | {
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
  }
  process = run(command(finished), env=environment)
  out, err = process.communicate(timeout=100)
  assert (process.returncode, err) == (0, "")
  assert out.isascii() and "accuracy %" in out
