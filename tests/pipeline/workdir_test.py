"""Tests of a run's directory: refused before training, or safe to write in."""

import collections
import dataclasses
import errno
import os
import pathlib
import shutil

import pytest

from dr_jax.config import Config, ConfigError, from_dict
from dr_jax.pipeline.workdir import Workdir, read_object
from dr_jax.runtime.files import write_json

Usage = collections.namedtuple("Usage", "total used free")


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_directory_at_or_below_a_file_raises_an_error(tmp_path, below):
  file = tmp_path / "file"
  file.write_text("precious")
  workdir = Workdir(file / below)
  message = f"^workdir {file / below} cannot be written to: {file} is not a dir"
  with pytest.raises(ConfigError, match=message):
    workdir.check(Config(), {})
  with pytest.raises(ConfigError, match=message):
    with workdir.claim(Config()):
      pass
  assert file.read_text() == "precious"


def test_a_directory_without_permission_to_write_raises_an_error(
  tmp_path, monkeypatch
):
  # Tests may run as root, for whom permissions do not count.
  asked = []
  monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path))
  with pytest.raises(ConfigError, match=f"{tmp_path}: Permission denied"):
    Workdir(tmp_path / "a/b").check(Config(), {})
  assert asked == [tmp_path]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_path_where_nothing_can_be_created_raises_an_error():
  path = "/proc/no_such_mount/run"
  with pytest.raises(ConfigError, match=f"^workdir {path} cannot be written"):
    with Workdir(path).claim(Config()):
      pass


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_cannot_be_written_to_raises_an_error(
  tmp_path, monkeypatch, code
):
  # Tests may run as root, for whom permissions do not count.
  def refuse(path, *args, **options):
    raise OSError(code, os.strerror(code), str(path))

  monkeypatch.setattr(pathlib.Path, "open", refuse)
  with pytest.raises(ConfigError, match=rf"written to: .*{os.strerror(code)}"):
    with Workdir(tmp_path).claim(Config()):
      raise AssertionError("nothing may start")


def test_an_error_inside_a_claim_is_not_reported_as_one_of_the_directory(
  tmp_path,
):
  with pytest.raises(OSError, match="^inside$"):
    with Workdir(tmp_path).claim(Config()):
      raise OSError("inside")
  # And the directory is free again.
  with Workdir(tmp_path).claim(Config()):
    pass


RESULT = {
  "scores": {"float": {"accuracy": 1.0, "loss": 1.0}},
  "train_seconds": 1.0,
}


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
    f"^workdir {tmp_path}: its disk has 5.0 MiB free, but pretrain, export may "
    "take 6.0 MiB more$"
  )
  with pytest.raises(ConfigError, match=message):
    workdir.check_space({"pretrain": 2 * 2**20, "export": 4 * 2**20})
  with pytest.raises(ConfigError, match="take 5.0 MiB more"):
    workdir.check_space({"pretrain": 2 * 2**20, "export": 3 * 2**20 + 1})


def test_finished_stages_and_files_already_written_need_no_more_room(
  tmp_path, monkeypatch
):
  _with_free(monkeypatch, 5)
  workdir = Workdir(tmp_path)
  write_json(tmp_path / "pretrain" / "result.json", RESULT)
  workdir.check_space({"pretrain": 90 * 2**20, "export": 5 * 2**20})
  with pytest.raises(ConfigError, match="take 6.0 MiB more"):
    workdir.check_space({"export": 6 * 2**20})
  (tmp_path / "export" / "model").mkdir(parents=True)
  (tmp_path / "export" / "model" / "half").write_bytes(bytes(2**20))
  workdir.check_space({"export": 6 * 2**20})
  # What one stage has too much of is no room for another.
  with pytest.raises(ConfigError, match="take 6.0 MiB more"):
    workdir.check_space({"export": 0, "supernet": 6 * 2**20})


def claim(path, values):
  with Workdir(path).claim(from_dict(values)):
    pass


VMAP = {"schedule": "accumulate", "vectorize": "vmap"}


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ({}, {"search": {"metric": "accuracy"}}),
    ({}, {"checkpoint_every": 7, "log_every": 3}),
    ({}, {"devices": {"data": 2, "parameters": "sharded"}}),
    ({"train": VMAP}, {"train": VMAP, "devices": {"bits": 2}}),
    (
      {"data": {"name": "folder"}},
      {"data": {"name": "folder", "path": "elsewhere", "workers": 2}},
    ),
  ],
)
def test_a_run_resumes_with_other_fields_that_change_nothing_trained(
  tmp_path, before, after
):
  claim(tmp_path, before)
  claim(tmp_path, after)


@pytest.mark.parametrize(
  ("before", "after", "difference"),
  [
    (
      {"devices": {"data": 1}},
      {"devices": {"data": 1, "norm": "per_device"}},
      "devices.norm is 'global' there, 'per_device' here",
    ),
    (
      {"devices": {"data": 1, "norm": "per_device"}},
      {"devices": {"data": 2, "norm": "per_device"}},
      "devices.data is 1 there, 2 here",
    ),
    ({}, {"data": {"batch_size": 64}}, "data.batch_size is 128 there, 64 here"),
  ],
)
def test_a_run_does_not_resume_with_another_configuration(
  tmp_path, before, after, difference
):
  claim(tmp_path, before)
  with pytest.raises(ConfigError, match=rf"configuration \({difference}\)"):
    claim(tmp_path, after)


def test_another_search_does_not_make_another_configuration(
  tmp_path,
):
  claim(tmp_path, {"seed": 3})
  claim(tmp_path, {"seed": 3, "search": {"budgets": (4,)}})
  assert read_object(tmp_path / "config.json")["search"]["budgets"] == [4]
  with pytest.raises(ConfigError, match="seed is 3 there, 1 here"):
    claim(tmp_path, {"seed": 1})


def test_a_configuration_with_the_former_name_of_a_data_set_is_the_same(
  tmp_path,
):
  path = tmp_path / "config.json"
  claim(tmp_path, {"data": {"name": "synthetic"}})
  held = read_object(path)
  held["data"]["name"] = "generated"
  write_json(path, held)
  claim(tmp_path, {"data": {"name": "synthetic"}})
  with pytest.raises(ConfigError, match="data.name is 'synthetic' there"):
    claim(tmp_path, {"data": {"name": "digits"}})


def test_a_configuration_with_the_former_names_of_fields_is_the_same(tmp_path):
  path = tmp_path / "config.json"
  for skip in ("raise", "skip"):
    data = {"name": "folder", "on_decode_error": skip}
    claim(tmp_path, {"data": data})
    held = read_object(path)
    held["data"]["damaged"] = held["data"].pop("on_decode_error")
    held["search"]["judge"] = held["search"].pop("eval_split")
    held["search"]["prefer"] = held["search"].pop("metric")
    write_json(path, held)
    claim(tmp_path, {"data": data})
    other = {"raise": "skip", "skip": "raise"}[skip]
    with pytest.raises(ConfigError, match=f"on_decode_error is '{skip}' there"):
      claim(tmp_path, {"data": {"name": "folder", "on_decode_error": other}})
    path.unlink()


def test_a_configuration_with_a_field_without_effect_is_the_same(tmp_path):
  path = tmp_path / "config.json"
  claim(tmp_path, {"data": {"name": "folder"}})
  held = read_object(path)
  held["data"]["dataset"] = "imagenet2012"
  write_json(path, held)
  claim(tmp_path, {"data": {"name": "folder"}})


def test_a_directory_in_use_keeps_its_configuration(tmp_path):
  path = tmp_path / "config.json"
  with Workdir(tmp_path).claim(Config()):
    before = path.read_text()
    with pytest.raises(ConfigError, match="is in use by another process"):
      claim(tmp_path, {"search": {"budgets": (7,)}})
    assert path.read_text() == before


def test_a_configuration_that_lacks_a_group_is_another_one(tmp_path):
  with Workdir(tmp_path).claim(Config()):
    pass
  path = tmp_path / "config.json"
  held = read_object(path)
  del held["devices"]
  write_json(path, held)
  with pytest.raises(ConfigError, match="devices is None there, {.* here"):
    with Workdir(tmp_path).claim(Config()):
      pass


def test_a_directory_takes_one_process_at_a_time(tmp_path):
  with Workdir(tmp_path).claim(Config()):
    with pytest.raises(ConfigError, match="is in use by another process"):
      with Workdir(tmp_path).claim(Config()):
        pass


def test_a_configuration_written_just_before_the_lock_is_seen(
  tmp_path, monkeypatch
):
  other = dataclasses.asdict(Config(seed=3))
  lock = Workdir._lock

  def after_another(self, file):
    write_json(tmp_path / "config.json", other)
    lock(self, file)

  monkeypatch.setattr(Workdir, "_lock", after_another)
  with pytest.raises(ConfigError, match="seed is 3 there, 0 here"):
    with Workdir(tmp_path).claim(Config()):
      pass
  assert read_object(tmp_path / "config.json")["seed"] == 3


def test_a_directory_with_other_files_is_left_as_it_is(tmp_path):
  (tmp_path / "thesis.txt").write_text("precious")
  with pytest.raises(ConfigError, match="is not empty and holds no run"):
    with Workdir(tmp_path).claim(Config()):
      pass
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_file_that_is_not_a_json_object_raises_an_error(tmp_path, content):
  path = tmp_path / "result.json"
  path.write_text(content)
  message = "result.json is damaged: .*; delete it and run again$"
  with pytest.raises(ConfigError, match=message):
    read_object(path)


def test_checkpoints_of_another_network_raise_an_error(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.record_network("pretrain", {"bits": (None,), "layers": ["a"]})
  workdir.record_network("pretrain", {"bits": (None,), "layers": ["a"]})
  with pytest.raises(
    ConfigError, match=r"another network \(layers is \['a'\] "
  ):
    workdir.record_network("pretrain", {"bits": (None,), "layers": ["b"]})
