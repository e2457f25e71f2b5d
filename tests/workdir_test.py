"""Tests of a run's directory: refused before training, or safe to write in."""

import collections
import errno
import os
import pathlib
import shutil

import pytest

from dr_jax.config import Config, ConfigError
from dr_jax.workdir import Workdir, write_json

Usage = collections.namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
  ("below", "reason"),
  [("", "File exists"), ("run", "Not a directory"), ("a/b", "Not a directory")],
)
def test_a_directory_at_or_below_a_file_cannot_be_written_to(
  tmp_path, below, reason
):
  file = tmp_path / "file"
  file.write_text("precious")
  message = rf"^workdir={file / below}: cannot be written to \(.*{reason}.*"
  with pytest.raises(ConfigError, match=message + "allowed is a directory"):
    with Workdir(file / below).claim(Config()):
      pass
  assert file.read_text() == "precious"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_place_where_nothing_can_be_created_is_refused():
  path = "/proc/no_such_mount/run"
  with pytest.raises(ConfigError, match=f"^workdir={path}: cannot be written"):
    with Workdir(path).claim(Config()):
      pass


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_is_there_but_takes_no_file_is_refused(
  tmp_path, monkeypatch, code
):
  # Tests may run as root, for whom permissions do not count.
  def refuse(path, *args, **options):
    raise OSError(code, os.strerror(code), str(path))

  monkeypatch.setattr(pathlib.Path, "write_text", refuse)
  with pytest.raises(ConfigError, match=rf"written to \(.*{os.strerror(code)}"):
    with Workdir(tmp_path).claim(Config()):
      raise AssertionError("nothing may start")


def test_what_fails_inside_a_claim_is_not_taken_for_its_own(tmp_path):
  with pytest.raises(OSError, match="^inside$"):
    with Workdir(tmp_path).claim(Config()):
      raise OSError("inside")
  # And the directory is free again.
  with Workdir(tmp_path).claim(Config()):
    pass


def _with_free(monkeypatch, megabytes):
  usage = Usage(0, 0, megabytes * 2**20)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_too_little_room_is_an_error_that_says_how_much_is_needed(
  tmp_path, monkeypatch
):
  _with_free(monkeypatch, 5)
  workdir = Workdir(tmp_path)
  workdir.check_space({"pretrain": 2 * 2**20, "export": 3 * 2**20})
  message = (
    f"^workdir={tmp_path}: its disk has 5.0 MiB free, but pretrain, export may "
    "take 6.0 MiB more; allowed is a directory with as much space$"
  )
  with pytest.raises(ConfigError, match=message):
    workdir.check_space({"pretrain": 2 * 2**20, "export": 4 * 2**20})
  with pytest.raises(ConfigError, match="take 5.0 MiB more"):
    workdir.check_space({"pretrain": 2 * 2**20, "export": 3 * 2**20 + 1})


def test_finished_stages_and_what_is_written_already_need_no_more_room(
  tmp_path, monkeypatch
):
  _with_free(monkeypatch, 5)
  workdir = Workdir(tmp_path)
  write_json(tmp_path / "pretrain" / "result.json", {})
  workdir.check_space({"pretrain": 90 * 2**20, "export": 5 * 2**20})
  with pytest.raises(ConfigError, match="take 6.0 MiB more"):
    workdir.check_space({"export": 6 * 2**20})
  (tmp_path / "export" / "model").mkdir(parents=True)
  (tmp_path / "export" / "model" / "half").write_bytes(bytes(2**20))
  workdir.check_space({"export": 6 * 2**20})
  # What one stage has too much of is no room for another.
  with pytest.raises(ConfigError, match="take 6.0 MiB more"):
    workdir.check_space({"export": 0, "supernet": 6 * 2**20})
