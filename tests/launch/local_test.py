"""Several processes on this machine, started by launch/local.sh."""

import os
import pathlib
import pty
import re
import signal
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "local.sh"


def living(part):
  """The command lines that hold `part`, this process's own aside."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      line = path.read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # It has just ended.
      continue
    if part in line and path.parent.name != str(os.getpid()):
      found.append(line)
  return found


SMALL = (
  "--config=configs/digits.py",
  '--config.stages=("pretrain",)',
  "--config.model.options.widths=(4, 4, 4)",
  "--config.pretrain.epochs=1",
)


def real_run(run, tmp_path, *flags):
  # conftest's four devices per process are for one process.
  return run(
    "local.sh",
    *SMALL,
    *flags,
    timeout=300,
    PATH=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    XLA_FLAGS="",
    XDG_CACHE_HOME=str(tmp_path / "cache"),
  )


@pytest.mark.slow
def test_two_processes_train_together_and_one_prints(run, tmp_path):
  workdir = tmp_path / "run"
  done = real_run(run, tmp_path, f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("accuracy %") == 1
  assert (workdir / "pretrain" / "result.json").is_file()
  assert [p.name for p in (tmp_path / "run.logs").iterdir()] == ["1.txt"]
  assert "accuracy" not in (tmp_path / "run.logs" / "1.txt").read_text()


@pytest.mark.slow
def test_errors_reach_the_user_and_no_process_is_left(run, tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "thesis.txt").write_text("precious")
  done = real_run(run, tmp_path, f"--workdir={workdir}")
  assert done.returncode == 2
  assert done.stderr.count("is not empty and holds no run") == 1
  assert "Traceback" not in done.stderr
  assert not living(str(workdir))


def test_every_process_knows_the_first_and_its_own_number(
  run, stand_in, tmp_path
):
  flags = (f"--workdir={tmp_path}/run/", "--config.name=two words")
  done = run("local.sh", *flags, PROCESSES="3")
  assert done.returncode == 0, done.stderr
  started = stand_in(3)
  addresses = set()
  for number, process in enumerate(started):
    assert process["argv"] == ["-m", "dr_jax.main", *flags]
    environment = process["environment"]
    assert environment["JAX_PROCESS_ID"] == str(number)
    assert environment["JAX_NUM_PROCESSES"] == "3"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "JAX_LOCAL_DEVICE_IDS" not in environment
    addresses.add(environment["JAX_COORDINATOR_ADDRESS"])
  assert len(addresses) == 1
  assert re.fullmatch(r"127\.0\.0\.1:\d+", addresses.pop())
  assert (tmp_path / "run.logs").is_dir() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("listed", "environment", "expected"),
  [
    ("echo 0; echo 1; echo 2; echo 3", {}, ["0,1", "2,3"]),
    ("echo 0; echo 1", {"CUDA_VISIBLE_DEVICES": "5,7"}, ["5", "7"]),
    ("echo 0; echo 1", {"CUDA_VISIBLE_DEVICES": ""}, ["", ""]),
    ("echo 0; echo 1", {"CUDA_VISIBLE_DEVICES": "-1"}, ["-1", "-1"]),
    ("echo 0", {"JAX_PLATFORMS": "cpu"}, [None, None]),
    ("echo no driver; exit 9", {}, [None, None]),
  ],
)
def test_gpus_are_divided(
  run, stand_in, on_path, monkeypatch, tmp_path, listed, environment, expected
):
  on_path("nvidia-smi", listed)
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
  done = run("local.sh", f"--workdir={tmp_path}/run", **environment)
  assert done.returncode == 0, done.stderr
  seen = [process["environment"] for process in stand_in(2)]
  assert [x.get("CUDA_VISIBLE_DEVICES") for x in seen] == expected
  local = {"0,1": "0,1", "5": "0"}.get(expected[0])
  assert {x.get("JAX_LOCAL_DEVICE_IDS") for x in seen} == {local}


@pytest.mark.parametrize(
  ("flags", "environment", "message"),
  [
    ((), {}, "--workdir must be a directory, got none"),
    (
      ("--workdir=run",),
      {"PROCESSES": "0"},
      "PROCESSES must be a whole number >= 1, got 0",
    ),
    (
      ("--workdir=run",),
      {"PROCESSES": "two"},
      "PROCESSES must be a whole number >= 1, got two",
    ),
    (
      ("--workdir=run",),
      {"CUDA_VISIBLE_DEVICES": "0,1,2"},
      "PROCESSES must divide the number of GPUs, 3, got 2",
    ),
    (("--workdir=/dev/null/run",), {}, "--workdir=/dev/null/run: /dev/null/"),
  ],
)
def test_what_cannot_start_is_one_line_and_exit_code_2(
  run, stand_in, flags, environment, message
):
  done = run("local.sh", *flags, **environment)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and message in done.stderr
  assert done.stderr.count("\n") == 1
  assert not stand_in(0)


def test_when_one_fails_the_others_are_ended(run, stand_in, tmp_path):
  (tmp_path / "run.logs").mkdir()
  (tmp_path / "run.logs" / "1.txt").write_text("of an earlier start\n")
  done = run("local.sh", f"--workdir={tmp_path}/run", WISH_0="wait", WISH_1="7")
  assert done.returncode == 7
  assert "process 1 failed with exit code 7; see " in done.stderr
  assert stand_in(2)[0]["signals"] == ["SIGTERM"]
  kept = (tmp_path / "run.logs" / "1.txt").read_text()
  assert kept.startswith("of an earlier start\n")


def test_the_exit_code_is_that_of_the_first_to_fail(run, stand_in, tmp_path):
  done = run(
    "local.sh",
    f"--workdir={tmp_path}/run",
    PROCESSES="3",
    WISH_0="wait",
    WISH_1="wait",
    WISH_2="1",
  )
  assert done.returncode == 1
  assert done.stderr.count("failed with exit code") == 1


def test_a_process_that_does_not_end_is_killed(run, stand_in, tmp_path):
  done = run(
    "local.sh",
    f"--workdir={tmp_path}/run",
    PATIENCE="1",
    WISH_0="7",
    WISH_1="stay",
  )
  assert done.returncode == 7
  assert "Killed" not in done.stderr  # Bash's own notice, with this script.
  assert stand_in(2)[1]["signals"] == ["SIGTERM"]
  assert not living(str(tmp_path / "run"))


def test_sigterm_reaches_every_process_once(stand_in, tmp_path):
  process = subprocess.Popen(
    [SCRIPT, f"--workdir={tmp_path}/run"],
    env=os.environ | {"WISH_0": "wait", "WISH_1": "wait"},
    stderr=subprocess.PIPE,
  )
  stand_in(2)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=30)
  assert process.returncode == 143
  assert said == b""  # Nothing has failed.
  assert [x["signals"] for x in stand_in(2)] == [["SIGTERM"]] * 2


# The child replaces itself with another program at once.
@pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")
def test_ctrl_c_in_a_terminal_reaches_every_process_once(stand_in, tmp_path):
  pid, terminal = pty.fork()
  if pid == 0:
    # A run in the background ignores it, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(WISH_0="wait", WISH_1="wait")
    os.execv(SCRIPT, ["local.sh", f"--workdir={tmp_path}/run"])
  stand_in(2)
  os.write(terminal, b"\x03")
  _, status = os.waitpid(pid, 0)
  os.close(terminal)
  assert os.waitstatus_to_exitcode(status) == 143
  assert [x["signals"] for x in stand_in(2)] == [["SIGINT"]] * 2


@pytest.mark.slow
def test_the_usage_of_the_local_script_is_what_the_command_takes(
  usage, parsed, run, stand_in, tmp_path
):
  commands = usage("local.sh")
  assert len(commands) == 2
  for words in commands:
    flags = words[words.index("launch/local.sh") + 1 :]
    elsewhere = [*flags, f"--workdir={tmp_path}/run"]
    assert run("local.sh", *elsewhere).returncode == 0
    argv = stand_in(2)[0]["argv"]
    assert parsed(argv) == (f"{tmp_path}/run", 0, False)
