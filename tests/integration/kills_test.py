"""Kills, full disks and damaged files: real processes, real files.

Every run here ends in the same bits as one that is left alone.
"""

import contextlib
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import quick_compilation

from dr_jax.checkpoint import Checkpoints  # noqa: F401  (Orbax loads once)

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("pretrain", "multi_precision")
FLAGS = (
  "--config=configs/digits.py",
  "--config.model.options.widths=(4,6,8)",
  "--config.quant.bits=(8,2)",
  "--config.pretrain.epochs=2",
  "--config.train.vectorize=sequential",
  "--config.checkpoint_every=5",
  "--config.log_every=3",
)
# The short run has 19 + 58 steps; the long one, without a tenth of the images,
# 17 + 353.
SHORT = "--config.train.epochs=6"
VALIDATED = (
  "--config.train.epochs=40",
  "--config.data.holdout=0.1",
  "--config.pretrain.validation_every=1",
  "--config.pretrain.keep_best=True",
  "--config.train.validation_every=4",
  "--config.train.keep_best=True",
)
COUNT_CACHE_HITS = """
import atexit, collections, runpy, jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name]))
cache = "/jax/compilation_cache/cache_"
atexit.register(lambda: print(seen[cache + "hits"], seen[cache + "misses"]))
runpy.run_module("dr_jax.main", run_name="__main__")
"""


class Job:
  """Starts the command; compiled programs are shared."""

  def __init__(self):
    self.environment = quick_compilation.environment()

  def start(self, workdir, *flags, program=("-m", "dr_jax.main"), shell=()):
    flags = [*FLAGS, f"--workdir={workdir}", *(flags or [SHORT])]
    return subprocess.Popen(
      [*shell, sys.executable, *program, *flags],
      cwd=ROOT,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def finish(self, workdir, *flags, **options):
    """Runs to the end; returns what was printed on both outputs."""
    process = self.start(workdir, *flags, **options)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def job():
  return Job()


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
  """The directory of the short run that is left alone."""
  workdir = tmp_path_factory.mktemp("run") / "whole"
  job.finish(workdir)
  return workdir


@pytest.fixture(scope="module")
def stopped(job, whole, tmp_path_factory):
  """A directory in which SIGTERM stopped the short run after 12 steps or so.

  It came twice, as some schedulers send it. The stage multi_precision has two
  checkpoints.
  """
  workdir = tmp_path_factory.mktemp("run") / "stopped"
  # Without the flag it is 0: see processes/training_test.
  process = job.start(workdir, SHORT, "--preempted_exit_code=75")
  wait_until(process, lambda: last_logged(workdir, "multi_precision") >= 12)
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=100)
  assert (process.returncode, out) == (75, ""), err
  *_, message = err.splitlines()
  step = max(steps_of(workdir, "multi_precision"))
  assert message == (
    f"multi_precision: stopped by SIGTERM after step {step} of 58; saved; "
    "rerun the same command to resume"
  )
  return workdir


def wait_until(process, reached, *, seconds=300):
  deadline = time.monotonic() + seconds
  while not reached():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.002)


def complete_lines(path):
  """Records of a file that another process may be writing."""
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]


def last_logged(workdir, stage):
  records = complete_lines(workdir / "metrics.jsonl")
  return max((r["step"] for r in records if r["stage"] == stage), default=0)


def steps_of(workdir, stage):
  """Steps of the complete checkpoints of a stage."""
  found = (workdir / stage / "checkpoints").glob("[0-9]*")
  return sorted(int(path.name) for path in found if path.name.isdecimal())


def resumed_from(err):
  """{stage: step} from which a process resumed, as it reported."""
  said = re.findall(r"^(\S+)  resumes from step (\d+) of", err, re.MULTILINE)
  return {stage: int(step) for stage, step in said}


def essence(workdir):
  """All that a run leaves behind, except how long it took."""

  def timeless(value):
    if not isinstance(value, dict):
      return value
    times = ("seconds", "train_seconds")
    return {k: timeless(v) for k, v in value.items() if k not in times}

  arrays = {}
  for stage in STAGES:
    last = max(steps_of(workdir, stage))
    # It holds a checksum of every array.
    manifest = workdir / stage / "checkpoints" / str(last) / "manifest"
    (file,) = manifest.glob("*.json")
    arrays[stage] = last, file.read_text()
    best = sorted((workdir / stage / "best").glob("*/manifest/*.json"))
    arrays[stage, "best"] = [
      (file.parent.parent.name, file.read_text()) for file in best
    ]
  # Every line of it: a torn one is no JSON.
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  metrics = [
    record
    for record in map(json.loads, lines)
    # Speeds differ, and so do the steps at which a run was stopped.
    if record["name"] not in ("examples_per_second", "loss_sum", "losses")
  ]
  summary = timeless(json.loads((workdir / "summary.json").read_text()))
  model = workdir / "export" / "model" / "model.safetensors"
  return arrays, metrics, summary, model.read_bytes()


def is_saving(workdir):
  return any(workdir.glob("*/checkpoints/*.orbax-checkpoint-tmp*"))


def file_of(path):
  """(inode, size) of a file; (None, 0) without one."""
  if not path.exists():
    return None, 0
  status = path.stat()
  return status.st_ino, status.st_size


def kill_at_some_moment(process, workdir, moments, kind):
  """Kills a process while it starts, while it trains, or while it saves.

  Returns:
    Whether it was still at work.
  """
  metrics = workdir / "metrics.jsonl"
  before, _ = file_of(metrics)

  def wait_while(condition):
    while process.poll() is None and condition():
      time.sleep(0.001)

  if kind == "starts":
    time.sleep(moments.uniform(0, 6))
  else:
    # A stage that begins replaces the file, and appends to it at each step.
    wait_while(lambda: file_of(metrics)[0] == before)
    replaced = file_of(metrics)
    wait_while(lambda: file_of(metrics) == replaced)
    time.sleep(moments.uniform(0, 1.2 if kind == "trains" else 0.6))
  if kind == "saves":
    wait_while(lambda: not is_saving(workdir))
  process.send_signal(signal.SIGKILL)
  return process.wait() == -signal.SIGKILL


def kill_again_and_again(job, workdir, flags, *, kills, seed):
  """Kills a run at random moments; checks what each kill has cost.

  Returns:
    How many kills hit a process at work, how many of them a save, and how many
    processes reported where they resumed.
  """
  print(f"kills at random moments: seed {seed}")
  moments = random.Random(seed)
  hit = torn = resumed = 0
  for number in range(kills):
    before = {stage: steps_of(workdir, stage) for stage in STAGES}
    process = job.start(workdir, *flags)
    kind = ("trains", "saves", "starts")[number % 3]
    at_work = kill_at_some_moment(process, workdir, moments, kind)
    _, err = process.communicate()
    assert at_work or process.returncode == 0, err
    hit += at_work
    torn += at_work and is_saving(workdir)
    for stage, step in resumed_from(err).items():
      resumed += 1
      assert step == max(before[stage], default=0), (stage, number)
    for stage in STAGES:
      last = max(steps_of(workdir, stage), default=0)
      assert last >= max(before[stage], default=0), (stage, number)
      # A save is complete when the next one begins, five steps later; killed
      # just before that, the checkpoint is the one of five steps earlier.
      assert last_logged(workdir, stage) - last <= 10, (stage, number)
  return hit, torn, resumed


def test_kills_at_random_moments_and_in_saves_change_nothing(job, tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  job.finish(whole, *VALIDATED)
  seed = random.SystemRandom().randrange(2**32)
  hit = torn = resumed = 0
  # Of three kills, one while it trains, one while it saves, one in its start.
  for number in range(12):
    counts = kill_again_and_again(
      job, killed, VALIDATED, kills=3, seed=seed + number
    )
    hit, torn, resumed = np.add((hit, torn, resumed), counts)
    # On a slow machine many end before their first checkpoint.
    if hit >= 6 and torn >= 1 and resumed >= 3:
      break
  assert hit >= 6, "the run was over too soon"
  assert torn >= 1, "hardly any kill hit a save"
  assert resumed >= 3, "hardly any process came to train"
  before = {stage: steps_of(killed, stage) for stage in STAGES}
  _, err = job.finish(killed, *VALIDATED)
  for stage, step in resumed_from(err).items():
    assert step == max(before[stage])
  assert essence(killed) == essence(whole)


def test_a_run_that_was_hung_up_ends_as_one_left_alone(job, whole, tmp_path):
  process = job.start(tmp_path)
  wait_until(process, lambda: last_logged(tmp_path, "multi_precision") >= 12)
  process.send_signal(signal.SIGHUP)
  _, err = process.communicate(timeout=100)
  assert process.returncode == 0, err
  step = max(steps_of(tmp_path, "multi_precision"))
  assert f"stopped by SIGHUP after step {step} of 58; saved" in err
  _, err = job.finish(tmp_path)
  assert resumed_from(err) == {"multi_precision": step}
  assert essence(tmp_path) == essence(whole)


def flip_a_bit(checkpoint):
  file = max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def empty_the_directory(checkpoint):
  shutil.rmtree(checkpoint)
  checkpoint.mkdir()


# Other damage, and that of every file: see checkpoints_test.
@pytest.mark.parametrize("damage", [flip_a_bit, empty_the_directory])
def test_a_run_resumes_before_a_damaged_checkpoint(
  job, whole, stopped, tmp_path, damage
):
  workdir = tmp_path / "damaged"
  shutil.copytree(stopped, workdir)
  before, last = steps_of(workdir, "multi_precision")
  path = workdir / "multi_precision" / "checkpoints" / str(last)
  damage(path)
  _, err = job.finish(workdir)
  (warning,) = [x for x in err.splitlines() if x.startswith("warning: ")]
  assert warning.startswith(f"warning: damaged checkpoint {path}: ")
  assert warning.endswith(f"; taking step {before}")
  assert resumed_from(err) == {"multi_precision": before}
  assert essence(workdir) == essence(whole)


@contextlib.contextmanager
def held(process):
  """Holds a process and its children still; a quick run would be over."""
  tree = [process.pid]
  for pid in tree:
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    tree += map(int, children.split())
  for pid in tree:
    os.kill(pid, signal.SIGSTOP)
  try:
    yield tree
  finally:
    for pid in tree:
      os.kill(pid, signal.SIGCONT)


def assert_stopped_by_the_disk(process, workdir):
  """One line and an exit code; checkpoints as they were or later."""
  out, err = process.communicate(timeout=200)
  assert process.returncode == 2 and out == "", err
  *_, line = err.splitlines()
  assert line.startswith("error: ") and "Traceback" not in err, err
  return line


def test_a_limit_on_file_sizes_stops_the_run_and_harms_no_checkpoint(
  job, whole, stopped, tmp_path
):
  workdir = tmp_path / "limited"
  shutil.copytree(stopped, workdir)
  last = max(steps_of(workdir, "multi_precision"))
  process = job.start(workdir)
  wait_until(process, lambda: last_logged(workdir, "multi_precision") > last)
  with held(process):
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
  line = assert_stopped_by_the_disk(process, workdir)
  assert "File too large" in line
  kept = max(steps_of(workdir, "multi_precision"))
  assert last <= kept < 58
  _, err = job.finish(workdir)
  assert resumed_from(err) == {"multi_precision": kept}
  assert essence(workdir) == essence(whole)


def disk_of(size, place, kept, after):
  """A shell that runs a command on a small disk of its own.

  Args:
    size: of the disk, as `mount` takes it.
    place: where it is mounted, for the command alone.
    kept: directory that is copied to it first.
    after: where its contents go when the command has ended.
  """
  script = (
    f"mount -t tmpfs -o size={size} none {place} && "
    f"cp -r {kept} {place}/run && "
    f'"$@"; code=$?; cp -r {place}/run {after}; exit $code'
  )
  shell = ["sh", "-c", script, "sh"]
  if os.geteuid() == 0:
    return ["unshare", "--mount", *shell]
  return ["unshare", "--map-root-user", "--mount", *shell]


@pytest.fixture
def small_disk(stopped, tmp_path):
  """Returns (shell, where its disk is mounted, where its contents go)."""
  place, after = tmp_path / "disk", tmp_path / "after"
  place.mkdir()

  def mounted(size):
    return disk_of(size, place, stopped, after), place, after

  shell, *_ = mounted("4m")
  try:
    tried = subprocess.run([*shell, "true"], capture_output=True)
  except FileNotFoundError:
    pytest.skip("no unshare here")
  if tried.returncode:
    pytest.skip("no disk can be mounted here")
  shutil.rmtree(after)
  return mounted


def test_a_disk_that_fills_up_stops_the_run_and_harms_no_checkpoint(
  job, whole, stopped, small_disk
):
  shell, place, after = small_disk("4m")
  last = max(steps_of(stopped, "multi_precision"))
  process = job.start(place / "run", shell=shell)
  # The disk is there for that process only.
  seen = pathlib.Path(f"/proc/{process.pid}/root{place}")
  workdir = seen / "run"
  wait_until(process, lambda: last_logged(workdir, "multi_precision") > last)
  with held(process), pytest.raises(OSError, match="No space left"):
    with (seen / "filler").open("wb", buffering=0) as file:
      while True:
        file.write(bytes(4096))
  line = assert_stopped_by_the_disk(process, after)
  assert "No space left on device" in line
  kept = max(steps_of(after, "multi_precision"))
  assert last <= kept < 58
  _, err = job.finish(after)
  assert resumed_from(err) == {"multi_precision": kept}
  assert essence(after) == essence(whole)


def test_a_disk_that_is_too_small_is_reported_before_training(
  job, stopped, small_disk
):
  shell, place, after = small_disk("700k")
  last = last_logged(stopped, "multi_precision")
  process = job.start(place / "run", shell=shell)
  line = assert_stopped_by_the_disk(process, after)
  assert f"workdir {place}/run: its disk has 0." in line
  assert "MiB free, but multi_precision, export may take" in line
  assert last_logged(after, "multi_precision") == last


def test_a_second_process_reads_its_programs_from_the_cache(
  job, whole, tmp_path
):
  out, _ = job.finish(
    tmp_path / "again", SHORT, program=("-c", COUNT_CACHE_HITS)
  )
  hits, misses = map(int, out.splitlines()[-1].split())
  # Another worker may have been writing an entry.
  assert hits > 100 and misses <= 5, (hits, misses)
