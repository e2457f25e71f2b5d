"""What launch/ starts: on this machine for real, elsewhere as far as can be."""

import json
import os
import pathlib
import pty
import re
import shlex
import signal
import subprocess
import sys
import time

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet as JobSet

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))

# Stands in for python -m dr_jax.main: says how it was started, and then waits
# for signals, counts them, or ends.
STAND_IN = """
import json, os, signal, sys, time
number = os.environ.get("JAX_PROCESS_ID", "0")
record = {"argv": sys.argv[1:], "environment": dict(os.environ), "signals": []}
path = os.path.join(os.environ["RECORD"], number)
def write():
  with open(path + ".part", "w") as file:
    json.dump(record, file)
  os.replace(path + ".part", path)
wish = os.environ.get("WISH_" + number, "0")
stop = []
def handle(which, frame):
  record["signals"].append(signal.Signals(which).name)
  write()
  stop.append(wish != "stay")
for which in (signal.SIGINT, signal.SIGTERM):
  signal.signal(which, handle)
write()
together = range(int(os.environ.get("JAX_NUM_PROCESSES", "1")))
while wish.strip("0") and not all(os.path.exists(path[:-1] + str(i)) for i in together):
  time.sleep(0.01)
while not any(stop) and not wish.isdecimal():
  time.sleep(0.01)
time.sleep(0.5 if stop else 0)  # A second signal would come now.
sys.exit(143 if stop else int(wish))
"""


@pytest.fixture(autouse=True)
def strict_numerics():
  """Nothing is computed in this process."""
  yield


@pytest.fixture
def on_path(tmp_path, monkeypatch):
  """Puts a shell script in front of everything else on PATH."""
  folder = tmp_path / "bin"
  folder.mkdir()
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

  def add(name, text):
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)

  return add


@pytest.fixture
def stand_in(on_path, tmp_path, monkeypatch):
  """Replaces python; returns what was started, by process, once it is there."""
  folder = tmp_path / "record"
  folder.mkdir()
  (tmp_path / "stand_in.py").write_text(STAND_IN)
  monkeypatch.setenv("RECORD", str(folder))
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
  real = sys.executable
  on_path(
    "python",
    f'[[ $1 == -c ]] && exec {real} "$@"\n'
    f'exec {real} {tmp_path}/stand_in.py "$@"',
  )

  def started(count=1):
    wait_until(lambda: all((folder / str(i)).exists() for i in range(count)))
    assert len(list(folder.glob("?"))) == count
    return [json.loads((folder / str(i)).read_text()) for i in range(count)]

  return started


def wait_until(condition, timeout=30):
  deadline = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def run(script, *flags, timeout=100, **environment):
  return subprocess.run(
    [LAUNCH / script, *flags],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=timeout,
  )


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
  '--config.stages=("pretrain","multi_precision")',
  "--config.model.options.widths=(4, 4, 4)",
  "--config.pretrain.epochs=1",
  "--config.train.epochs=1",
  "--config.train.vectorize=sequential",
)


def real_run(tmp_path, *flags):
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


def test_two_processes_train_together_and_one_speaks(tmp_path):
  workdir = tmp_path / "run"
  done = real_run(tmp_path, f"--workdir={workdir}", "--config.devices.data=2")
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("accuracy %") == 1
  assert json.loads((workdir / "summary.json").read_text())["stages"]
  assert [p.name for p in (tmp_path / "run.logs").iterdir()] == ["1.txt"]
  assert "accuracy" not in (tmp_path / "run.logs" / "1.txt").read_text()


def test_what_is_wrong_reaches_the_user_and_nothing_is_left(tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "thesis.txt").write_text("precious")
  done = real_run(tmp_path, f"--workdir={workdir}")
  assert done.returncode == 2
  assert done.stderr.count("is not empty and holds no run") == 1
  assert "Traceback" not in done.stderr
  assert not living(str(workdir))


def test_every_process_knows_the_first_and_its_own_number(stand_in, tmp_path):
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
  stand_in, on_path, monkeypatch, tmp_path, listed, environment, expected
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
    ((), {}, "--workdir=: missing; allowed is"),
    (("--workdir=run",), {"PROCESSES": "0"}, "PROCESSES=0: not a number"),
    (("--workdir=run",), {"PROCESSES": "two"}, "PROCESSES=two: not a number"),
    (
      ("--workdir=run",),
      {"CUDA_VISIBLE_DEVICES": "0,1,2"},
      "PROCESSES=2: does not divide 3 GPUs; allowed are",
    ),
    (("--workdir=/dev/null/run",), {}, "--workdir=/dev/null/run: /dev/null/"),
  ],
)
def test_what_cannot_start_is_one_line_and_exit_code_2(
  stand_in, flags, environment, message
):
  done = run("local.sh", *flags, **environment)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and message in done.stderr
  assert done.stderr.count("\n") == 1
  assert not stand_in(0)


def test_when_one_fails_the_others_are_ended(stand_in, tmp_path):
  done = run("local.sh", f"--workdir={tmp_path}/run", WISH_0="wait", WISH_1="7")
  assert done.returncode == 7
  assert "process 1 failed with exit code 7; see " in done.stderr
  assert stand_in(2)[0]["signals"] == ["SIGTERM"]


def test_the_exit_code_is_that_of_the_first_to_fail(stand_in, tmp_path):
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


def test_one_that_does_not_end_is_killed(stand_in, tmp_path):
  done = run(
    "local.sh",
    f"--workdir={tmp_path}/run",
    PATIENCE="1",
    WISH_0="7",
    WISH_1="stay",
  )
  assert done.returncode == 7
  assert stand_in(2)[1]["signals"] == ["SIGTERM"]
  assert not living(str(tmp_path / "run"))


def test_sigterm_reaches_every_process_once(stand_in, tmp_path):
  process = subprocess.Popen(
    [LAUNCH / "local.sh", f"--workdir={tmp_path}/run"],
    env=os.environ | {"WISH_0": "wait", "WISH_1": "wait"},
  )
  stand_in(2)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 143
  assert [x["signals"] for x in stand_in(2)] == [["SIGTERM"]] * 2


def test_ctrl_c_in_a_terminal_reaches_every_process_once(stand_in, tmp_path):
  pid, terminal = pty.fork()
  if pid == 0:
    os.environ.update(WISH_0="wait", WISH_1="wait")
    os.execv(LAUNCH / "local.sh", ["local.sh", f"--workdir={tmp_path}/run"])
  stand_in(2)
  os.write(terminal, b"\x03")
  _, status = os.waitpid(pid, 0)
  os.close(terminal)
  assert os.waitstatus_to_exitcode(status) == 143
  assert [x["signals"] for x in stand_in(2)] == [["SIGINT"]] * 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_has_nothing_to_say(script):
  subprocess.run(["bash", "-n", script], check=True)
  beside = pathlib.Path(sys.executable).parent / "shellcheck"
  done = subprocess.run([beside, script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
  assert os.access(script, os.X_OK)


# The command as it parses its flags, without the run.
PARSE = """
import sys
from dr_jax import main
from dr_jax.config import from_dict
main._parse(sys.argv)
from_dict(main._CONFIG.value.to_dict())
print(main._WORKDIR.value, main._PREEMPTED.value, main._DISTRIBUTED.value)
"""


def parsed(argv):
  """What the command makes of `python -m dr_jax.main ...`.

  Returns:
    workdir, exit code after SIGTERM, whether it asks the cluster.
  """
  assert argv[-len(argv) :][:2] == ["-m", "dr_jax.main"]
  done = subprocess.run(
    [sys.executable, "-c", PARSE, *argv[2:]],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  workdir, code, detect = done.stdout.split()
  return workdir, int(code), detect == "True"


def usage(script):
  """The commands in a script's first lines, as lists of words."""
  header = (LAUNCH / script).read_text().partition("\nset ")[0]
  text = header.replace("\\\n#", " ")
  return [
    shlex.split(line[1:])
    for line in text.splitlines()
    if line.startswith("#  ") and f"launch/{script}" in line
  ]


def test_the_usage_of_the_local_script_is_what_the_command_takes(
  stand_in, tmp_path
):
  commands = usage("local.sh")
  assert len(commands) == 2
  for words in commands:
    flags = words[words.index("launch/local.sh") + 1 :]
    elsewhere = [*flags, f"--workdir={tmp_path}/run"]
    assert run("local.sh", *elsewhere).returncode == 0
    argv = stand_in(2)[0]["argv"]
    assert parsed(argv) == (f"{tmp_path}/run", 0, False)


@pytest.fixture
def slurm(stand_in, on_path, tmp_path, monkeypatch):
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


def test_the_slurm_script_starts_the_command(slurm, stand_in):
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
def test_xpk_starts_the_command(device, stand_in, on_path, tmp_path):
  on_path("xpk", f'printf "%s\\0" "$@" >{tmp_path}/xpk')
  words = next(x for x in usage("xpk.sh") if device in x)
  # Blanks and parentheses survive the shell in the pod.
  flags = [*words[words.index(device) + 1 :], "--config.quant.bits=(8, 4)"]
  done = run("xpk.sh", device, *flags)
  assert done.returncode == 0, done.stderr
  said = (tmp_path / "xpk").read_text().split("\0")[:-1]
  assert said[:2] == ["workload", "create"]
  options = dict(x.removeprefix("--").split("=", 1) for x in said[2:])
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
    (("cpu",), "cpu: no device; allowed are tpu and gpu"),
    (("tpu", "--config.name=it's"), "--config.name=it's: holds a quote"),
  ],
)
def test_what_xpk_cannot_take_is_one_line(on_path, arguments, message):
  on_path("xpk", "exit 5")
  done = run("xpk.sh", *arguments)
  assert done.returncode == 2
  assert f"error: {message}" in done.stderr and done.stderr.count("\n") == 1


def jobs(manifest):
  return [x["template"]["spec"] for x in manifest["spec"]["replicatedJobs"]]


def check_schemas(manifest):
  """Holds a manifest against the schemas of JobSet and of Kubernetes."""
  # What the schema does not know does not come back.
  assert JobSet.from_dict(manifest).to_dict() == manifest
  for spec in jobs(manifest):
    job = {
      "apiVersion": "batch/v1",
      "kind": "Job",
      "metadata": {"name": "job"},
      "spec": spec,
    }
    kubernetes_validate.validate(job, "1.31", strict=True)


@pytest.fixture(params=MANIFESTS, ids=lambda p: p.name)
def manifest(request):
  return yaml.safe_load(request.param.read_text())


def test_manifests_fit_the_schemas(manifest):
  check_schemas(manifest)


@pytest.mark.parametrize(
  "damage",
  [
    lambda m: m["spec"].update(failurePolicies={}),
    lambda m: m["spec"]["failurePolicy"].update(maxRestarts="five"),
    lambda m: jobs(m)[0].update(backofLimit=0),
    lambda m: jobs(m)[0].update(parallelism="2"),
    lambda m: jobs(m)[0]["template"]["spec"].update(containers={}),
  ],
)
def test_a_damaged_manifest_does_not_fit(manifest, damage):
  damage(manifest)
  with pytest.raises((AssertionError, ValueError, AttributeError)):
    check_schemas(manifest)


def test_manifests_start_the_command_with_what_they_promise(manifest):
  (replicated,) = manifest["spec"]["replicatedJobs"]
  (job,) = jobs(manifest)
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  environment = {x["name"]: x for x in container.get("env", ())}
  on_gpu = "nvidia.com/gpu" in container["resources"]["limits"]

  assert container["command"][0] == "python"
  workdir, code, detect = parsed(container["command"][1:])
  assert detect == (not on_gpu)

  # Preemption, and nothing else, starts again without end.
  exit_codes, disrupted = job["podFailurePolicy"]["rules"]
  assert exit_codes["onExitCodes"]["values"] == [code] == [143]
  assert exit_codes["onExitCodes"]["containerName"] == container["name"]
  assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
  (rule,) = manifest["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]

  # Run, data and compiled programs are on a volume.
  mounts = {x["mountPath"]: x["name"] for x in container["volumeMounts"]}
  assert {x["name"] for x in pod["volumes"]} == set(mounts.values())
  paths = [workdir, environment["XDG_CACHE_HOME"]["value"]]
  paths += [x.partition("=")[2] for x in container["command"] if ".path=" in x]
  assert len(paths) == 3
  assert all(path.startswith("/shared/") for path in paths)
  assert "/shared" in mounts

  assert job["parallelism"] == job["completions"] > 1
  if on_gpu:
    assert (
      manifest["spec"]["coordinator"]["replicatedJob"] == replicated["name"]
    )
    count = environment["JAX_NUM_PROCESSES"]["value"]
    assert count == str(job["completions"])
    assert "job-completion-index" in json.dumps(environment["JAX_PROCESS_ID"])
    address = environment["JAX_COORDINATOR_ADDRESS"]["value"]
    assert re.fullmatch(r"\$\(COORDINATOR\):\d+", address)
    # Expanded only if it was named before.
    names = list(environment)
    assert names.index("COORDINATOR") < names.index("JAX_COORDINATOR_ADDRESS")
