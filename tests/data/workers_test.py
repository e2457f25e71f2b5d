"""Tests of worker processes: order, resumption, and their end."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dr_jax import data
from dr_jax.data.workers import read_ahead

AUGMENTED = {"augment": "random_resized_crop", "image_size": 8}


def equal(got, want):
  assert set(got) == set(want)
  for name in want:
    assert got[name].dtype == want[name].dtype
    np.testing.assert_array_equal(got[name], want[name])


def test_workers_make_the_batches_of_this_process_bit_for_bit(make_folder):
  path = make_folder()
  torn = path / "train" / "cat" / "03.JPG"
  torn.write_bytes(torn.read_bytes()[:100])
  loaded = data.load(
    "folder", path=str(path), on_decode_error="skip", **AUGMENTED
  )
  options = {"batch_size": 7, "seed": 3}
  with pytest.warns(UserWarning, match="03.JPG"):
    alone = data.batches(loaded.train, **options)
    want = [alone[step] for step in range(2, 9)]
  counted = dict(loaded.train.unreadable)
  loaded.train.unreadable.clear()
  stream = data.batches(loaded.train, **options, workers=2).stream(2)
  with pytest.warns(UserWarning, match="03.JPG"):
    for batch in want:
      equal(next(stream), batch)
  assert dict(loaded.train.unreadable) == counted
  assert len(multiprocessing.active_children()) == 2
  stream.close()
  assert not multiprocessing.active_children()


def test_workers_read_an_evaluation_to_its_end(prepared):
  loaded = data.load("tfds", dataset="blobs", path=prepared)
  want = list(data.epoch(loaded.test, batch_size=4))
  got = list(data.epoch(loaded.test, batch_size=4, workers=2))
  assert len(got) == len(want) == 3
  for one, other in zip(got, want, strict=True):
    equal(one, other)
  assert not multiprocessing.active_children()


def test_an_unreadable_image_reaches_the_process_that_asked(make_folder):
  path = make_folder()
  (path / "test" / "cat" / "02.png").write_bytes(b"")
  loaded = data.load("folder", path=str(path))
  with pytest.raises(
    data.UnreadableImage,
    match=r"cat/02\.png cannot be read",
  ):
    list(data.epoch(loaded.test, batch_size=4, workers=1))
  assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_one_line(make_folder):
  loaded = data.load("folder", path=str(make_folder()), **AUGMENTED)
  stream = data.batches(loaded.train, batch_size=4, seed=0, workers=1).stream()
  next(stream)
  (worker,) = multiprocessing.active_children()
  os.kill(worker.pid, signal.SIGKILL)
  with pytest.raises(
    data.WorkerError, match="workers=1 failed: Worker process was terminated"
  ):
    for _ in range(10):
      next(stream)


def test_workers_are_a_few_batches_ahead(tmp_path):
  def batch(number):
    (tmp_path / str(number)).touch()
    return {"number": np.array([number])}

  with contextlib.closing(read_ahead(batch, 100, workers=2)) as stream:
    assert [next(stream)["number"].item() for _ in range(3)] == [0, 1, 2]
    made = []
    # Until they wait.
    while len(made) < 2 or made[-1] != made[-2]:
      time.sleep(0.3)
      made.append(len(list(tmp_path.iterdir())))
  assert 3 < made[-1] <= 3 + 2 * 4


STREAM = """
import multiprocessing, sys
from dr_jax import data

if __name__ == "__main__":
  loaded = data.load("synthetic", image_size=8)
  stream = data.batches(loaded.train, batch_size=4, seed=0, workers=2).stream()
  for step, _ in enumerate(stream):
    if step == 2:
      print(*(c.pid for c in multiprocessing.active_children()), flush=True)
      sys.stdin.readline()
      print(next(stream)["label"].shape[0], flush=True)
      sys.stdin.readline()
"""


def _runs(pid):
  try:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
      return file.read().split()[2] != "Z"
  except FileNotFoundError:
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_outlive_signals_but_not_the_process_they_work_for(tmp_path):
  script = tmp_path / "stream.py"
  script.write_text(STREAM)
  process = subprocess.Popen(
    [sys.executable, script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  workers = [int(pid) for pid in process.stdout.readline().split()]
  assert len(workers) == 2
  for worker in workers:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
      os.kill(worker, number)
  process.stdin.write("\n")
  process.stdin.flush()
  assert process.stdout.readline() == "4\n"
  assert all(map(_runs, workers))
  process.kill()
  process.communicate()
  deadline = time.monotonic() + 30
  while any(map(_runs, workers)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(_runs, workers))
