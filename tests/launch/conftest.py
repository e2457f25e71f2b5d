"""Stand-ins for what launch/ starts and for what it finds around it."""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

# Stands in for python -m dr_jax.main: says how it was started, and then waits
# for signals, counts them, or ends.
STAND_IN = """
import json, os, signal, sys, time
number = os.environ.get("JAX_PROCESS_ID", "0")
record = {"argv": sys.argv[1:], "environment": dict(os.environ)}
record |= {"signals": [], "pid": os.getpid()}
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
count = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
others = [path[:-1] + str(i) for i in range(count) if wish != "0"]
while not all(map(os.path.exists, others)):  # They can take a signal then.
  time.sleep(0.01)
while not any(stop) and not wish.isdecimal():
  time.sleep(0.01)
time.sleep(0.5 if stop else 0)  # A second signal would come now.
sys.exit(143 if stop else int(wish))
"""


# The command as it parses its flags, without the run.
PARSE = """
import sys
from dr_jax import main
from dr_jax.config import from_dict
main._parse(sys.argv)
from_dict(main._CONFIG.value.to_dict())
print(main._WORKDIR.value, main._PREEMPTED.value, main._DISTRIBUTED.value)
"""


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

  yield started
  for path in folder.glob("?"):  # What a failed test has left.
    with contextlib.suppress(ProcessLookupError):
      os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)


def wait_until(condition, timeout=30):
  deadline = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.fixture
def run():
  """Runs a script of launch/ to its end."""

  def start(script, *flags, timeout=60, **environment):
    return subprocess.run(
      [LAUNCH / script, *flags],
      cwd=ROOT,
      env=os.environ | environment,
      capture_output=True,
      text=True,
      timeout=timeout,
    )

  return start


@pytest.fixture
def parsed():
  """What the command makes of `python -m dr_jax.main ...`."""

  def of(argv):
    """Workdir, exit code after SIGTERM, whether it asks the cluster."""
    assert argv[:2] == ["-m", "dr_jax.main"]
    done = subprocess.run(
      [sys.executable, "-c", PARSE, *argv[2:]],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    workdir, code, detect = done.stdout.split()
    return workdir, int(code), detect == "True"

  return of


@pytest.fixture
def usage():
  """What a script's first lines say to type."""

  def of(script):
    """The commands that start the script, as lists of words."""
    header = (LAUNCH / script).read_text().partition("\nset ")[0]
    text = header.replace("\\\n#", " ")
    return [
      shlex.split(line[1:])
      for line in text.splitlines()
      if line.startswith("#  ") and f"launch/{script}" in line
    ]

  return of
