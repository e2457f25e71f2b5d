"""Scripts for Slurm and xpk, between stand-ins for what they call."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize(
  "script", sorted(LAUNCH.glob("*.sh")), ids=lambda p: p.name
)
def test_shellcheck_finds_nothing(script):
  subprocess.run(["bash", "-n", script], check=True)
  beside = pathlib.Path(sys.executable).parent / "shellcheck"
  done = subprocess.run([beside, script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
  assert os.access(script, os.X_OK)


@pytest.fixture
def slurm(usage, run, stand_in, on_path, tmp_path, monkeypatch):
  """Runs the script as Slurm would; returns its end and what was requeued."""
  log = tmp_path / "requeued"
  log.write_text("")
  on_path("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
  on_path("scontrol", f'echo "$@" >>{log}')
  monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
  monkeypatch.setenv("SLURM_JOB_ID", "17")

  def start(code="0", state="RUNNING"):
    on_path("squeue", f"echo {state}")
    (words,) = usage("slurm.sh")
    flags = words[words.index("launch/slurm.sh") + 1 :]
    return run("slurm.sh", *flags, WISH_0=code), log.read_text()

  return start


def test_the_slurm_script_starts_the_command(parsed, slurm, stand_in):
  done, requeued = slurm()
  assert done.returncode == 0, done.stderr
  assert requeued == ""
  assert parsed(stand_in()[0]["argv"]) == ("runs/resnet50", 143, True)


@pytest.mark.parametrize(
  ("code", "state", "again"),
  [
    ("143", "RUNNING", "requeue 17\n"),
    ("143", "COMPLETING", ""),
    ("2", "RUNNING", ""),
  ],
)
def test_a_preempted_slurm_job_starts_again(slurm, code, state, again):
  done, requeued = slurm(code, state)
  assert done.returncode == int(code)
  assert requeued == again


def test_slurm_options_stand_first_and_fit_together():
  text = (LAUNCH / "slurm.sh").read_text()
  # sbatch reads no further than the first command.
  header, _, rest = text.partition("\nset ")
  assert "#SBATCH" not in rest
  options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.+))?$", header, re.M))
  assert len(options) == header.count("#SBATCH")
  # JAX takes one device for each process of a Slurm job.
  assert options["ntasks-per-node"] == options["gpus-per-node"]
  assert re.fullmatch(r"TERM@\d+", options["signal"])
  assert "requeue" in options


@pytest.mark.parametrize("device", ["tpu", "gpu"])
def test_xpk_starts_the_command(
  usage, parsed, run, device, stand_in, on_path, tmp_path
):
  on_path("xpk", f'printf "%s\\0" "$@" >{tmp_path}/xpk')
  words = next(x for x in usage("xpk.sh") if device in x)
  # Blanks and parentheses survive the shell in the pod.
  flags = [*words[words.index(device) + 1 :], "--config.quant.bits=(8, 4)"]
  done = run("xpk.sh", device, *flags)
  assert done.returncode == 0, done.stderr
  said = (tmp_path / "xpk").read_text().split("\0")[:-1]
  assert said[:2] == ["workload", "create"]
  options = dict(x.removeprefix("--").split("=", 1) for x in said[2:])
  # xpk hands SIGTERM to the shell that this replaces.
  assert options["command"].startswith("exec ")
  # What processes end with that have lost another one; 143 is among xpk's own.
  assert options["restart-on-exit-codes"] == "3"
  assert ("tpu-type" in options) == (device == "tpu")
  assert '"' not in options["command"] and "\n" not in options["command"]
  in_pod = {
    "JAX_COORDINATOR_ADDRESS": "dr-jax-slice-job-0-0.dr-jax",
    "JAX_COORDINATOR_PORT": "6002",
    "NNODES": "2",
    "NODE_RANK": "0",
  }
  subprocess.run(
    ["bash", "-c", f"({options['command']})"],
    env=os.environ | (in_pod if device == "gpu" else {}),
    check=True,
  )
  process = stand_in()[0]
  assert process["argv"][-1] == flags[-1]
  assert parsed(process["argv"]) == (
    "/shared/runs/resnet50",
    143,
    device == "tpu",
  )
  if device == "gpu":
    environment = process["environment"]
    assert environment["JAX_COORDINATOR_ADDRESS"].endswith(".dr-jax:6002")
    assert environment["JAX_NUM_PROCESSES"] == "2"
    assert environment["JAX_PROCESS_ID"] == "0"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("cpu",), "device must be tpu or gpu, got 'cpu'"),
    (
      ("tpu", "--config.name=it's"),
      "flags must have no quote and no backslash",
    ),
  ],
)
def test_what_xpk_cannot_take_is_one_line(run, on_path, arguments, message):
  on_path("xpk", "exit 5")
  done = run("xpk.sh", *arguments)
  assert done.returncode == 2
  assert f"error: {message}" in done.stderr and done.stderr.count("\n") == 1
