"""Directories that appear whole or not at all, also when writers are killed."""

import shutil
import signal
import subprocess
import sys
import time

import pytest

from dr_jax.runtime import files

WRITER = """
import pathlib, sys
from dr_jax.runtime import files
print(flush=True)
for number in range(10**6):
  with files.atomic_directory(f"{sys.argv[1]}/model{number % 2}") as draft:
    for name in "ab":
      (draft / name).write_bytes(bytes(10**6))
  import shutil
  shutil.rmtree(f"{sys.argv[1]}/model{number % 2}")
"""


@pytest.mark.parametrize(
  "kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
)
def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path, kind):
  if signal.getsignal(kind) is signal.SIG_IGN:
    pytest.skip("this run ignores the signal, as under nohup")
  for number, moment in enumerate((0.0, 0.003, 0.01, 0.017, 0.03)):
    (tmp_path / str(number)).mkdir()
    with subprocess.Popen(
      [sys.executable, "-c", WRITER, str(tmp_path / str(number))],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    ) as process:
      process.stdout.readline()
      time.sleep(moment)
      process.send_signal(kind)
    assert process.returncode == -kind
    check_what_is_left(tmp_path / str(number), drafts=kind == signal.SIGKILL)


def check_what_is_left(directory, drafts):
  names = {path.name for path in directory.iterdir()}
  left = {name for name in names if not name.startswith(".")}
  assert drafts or left == names
  for name in left:  # Complete, but for one that was being removed.
    assert name in ("model0", "model1")
    for file in (directory / name).iterdir():
      assert file.stat().st_size == 10**6
  for name in ("model0", "model1"):
    shutil.rmtree(directory / name, ignore_errors=True)
    with files.atomic_directory(directory / name):
      pass
  assert {path.name for path in directory.iterdir()} == {"model0", "model1"}


def test_of_two_writers_at_once_the_first_to_end_wins(tmp_path):
  with pytest.raises(FileExistsError, match="exists already; choose a new"):
    with files.atomic_directory(tmp_path / "model") as mine:
      with files.atomic_directory(tmp_path / "model") as other:
        (other / "a").write_text("other")
        (mine / "a").write_text("mine")
  assert (tmp_path / "model" / "a").read_text() == "other"
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
