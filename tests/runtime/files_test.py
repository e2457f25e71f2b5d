"""Tests of writes that are complete or absent."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dr_jax.runtime import files
from tests.support import disk

ROOT = pathlib.Path(__file__).parents[2]


def test_text_bytes_and_json_come_back(tmp_path):
  files.write_text(tmp_path / "text", "Überschuss\n")
  assert (tmp_path / "text").read_text(encoding="utf-8") == "Überschuss\n"
  files.write_bytes(tmp_path / "bytes", b"\x00\xff")
  assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
  files.write_json(tmp_path / "json", {"a": [1, None, "x"]})
  assert files.read_json(tmp_path / "json") == {"a": [1, None, "x"]}


def test_a_write_makes_directories_and_leaves_nothing_else(tmp_path):
  files.write_text(tmp_path / "new" / "directory" / "file", "text")
  files.write_text(str(tmp_path / "new" / "directory" / "file"), "newer")
  (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
  assert file.read_text() == "newer"


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
  path = tmp_path / "file.json"
  files.write_json(path, {"old": 1})
  with pytest.raises(TypeError, match="not JSON serializable"):
    files.write_json(path, {"new": object()})
  assert files.read_json(path) == {"old": 1}
  assert os.listdir(tmp_path) == ["file.json"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
  path = tmp_path / "file"
  files.write_bytes(path, b"old")
  with disk.full_after(2), pytest.raises(OSError, match="File too large"):
    files.write_bytes(path, b"newer")
  assert path.read_bytes() == b"old"
  assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_is_whole_and_none_is_replaced(tmp_path):
  files.create_bytes(tmp_path / "new" / "file", b"mine")
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  for name in ("new", "new/file", "link"):
    with pytest.raises(FileExistsError, match="exists already; choose a new"):
      files.create_bytes(tmp_path / name, b"yours")
  assert (tmp_path / "new" / "file").read_bytes() == b"mine"
  assert files.size(tmp_path / "new") == files.size(tmp_path / "new/file") == 4


WRITE_FOREVER = """
import sys
from dr_jax.runtime import files
assert "jax" not in sys.modules and "rich" not in sys.modules
for number in range(1_000_000):
  files.write_json(sys.argv[1], [number] * 50_000)
"""


def test_a_process_killed_while_writing_leaves_a_whole_file(tmp_path):
  path = tmp_path / "file.json"
  writer = subprocess.Popen(
    [sys.executable, "-c", WRITE_FOREVER, path], cwd=ROOT
  )
  deadline = time.monotonic() + 60
  # Killed in the middle of a write that replaces a file.
  while not (path.exists() and files.partial_path(path).exists()):
    assert writer.poll() is None and time.monotonic() < deadline
  writer.kill()
  assert writer.wait() == -signal.SIGKILL
  numbers = files.read_json(path)
  assert len(numbers) == 50_000 and len(set(numbers)) == 1
  # What is left of the write that was killed is in nobody's way.
  files.write_json(path, "complete")
  assert os.listdir(tmp_path) == ["file.json"]


def test_damaged_json_is_one_line_that_names_the_file(tmp_path):
  path = tmp_path / "file.json"
  for content in (b'{"a": [1, ', b"\xff\xfe", b""):
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
      files.read_json(path)
    assert str(error.value).startswith(f"{path} is damaged: ")
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, json.JSONDecodeError)
  with pytest.raises(FileNotFoundError):
    files.read_json(tmp_path / "absent.json")


def test_a_path_below_a_file_is_not_a_directory(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  with pytest.raises(NotADirectoryError, match="Not a directory: '.*/file'"):
    files.write_bytes(tmp_path / "file" / "new", b"")
  assert (tmp_path / "file").read_bytes() == b""


def test_a_directory_is_not_read_as_a_file(tmp_path):
  with pytest.raises(ValueError, match="^must be a regular file$"):
    files.read_bytes(tmp_path, limit=1)


def test_a_directory_appears_when_its_block_ends(tmp_path):
  path = tmp_path / "new" / "artifact"
  with files.atomic_directory(path) as draft:
    (draft / "file").write_text("text")
    assert not path.exists() and draft.parent == path.parent
  assert (path / "file").read_text() == "text"
  assert path.stat().st_mode & 0o777 == 0o755
  assert os.listdir(path.parent) == ["artifact"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_directory_whose_block_fails_leaves_nothing(tmp_path, error):
  with pytest.raises(error):
    with files.atomic_directory(tmp_path / "artifact") as draft:
      (draft / "file").write_text("text")
      raise error
  assert os.listdir(tmp_path) == []


def test_an_existing_directory_is_not_overwritten(tmp_path):
  (tmp_path / "artifact").mkdir()
  with pytest.raises(FileExistsError, match="artifact exists already"):
    with files.atomic_directory(tmp_path / "artifact"):
      pytest.fail("the block must not run")
  assert os.listdir(tmp_path) == ["artifact"]
