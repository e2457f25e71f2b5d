"""The directory of a run: which configuration owns it, and its results.

A stage is done when its `result.json` exists. Every file is complete or
absent; files of another configuration are never overwritten. Of several
processes, the first one reads and writes for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dr_jax.config import Config, ConfigError, DataConfig
from dr_jax.report.results import schema_of
from dr_jax.runtime import command, files
from dr_jax.runtime.processes import on_first

_GROUPS = tuple(
  field.name
  for field in dataclasses.fields(Config)
  if dataclasses.is_dataclass(field.default)
)


class Workdir:
  """One run's directory.

  Attributes:
    path: the directory.
    metrics: its file of numbers, JSON lines.
  """

  def __init__(self, path: str | os.PathLike, bits: Iterable[int] = ()):
    """Writes nothing.

    Args:
      path: the directory.
      bits: bit-widths that results must have.
    """
    self.path = files.expand(path)
    self._bits = tuple(bits)
    self.metrics = self.path / "metrics.jsonl"

  def check(self, config: Config, stages: Mapping[str, int]) -> None:
    """Checks what a claim would meet, and the room; writes nothing.

    Args:
      config: of the run.
      stages: as for `check_space`.

    Raises:
      ConfigError: as `claim` and `check_space`.
    """

    def check():
      try:
        self._check(config)
        self._check_space(stages)
      except OSError as error:
        raise ConfigError(
          f"workdir {self.path} cannot be read: {command.one_line(error)}"
        ) from None

    on_first(check)

  @contextlib.contextmanager
  def claim(self, config: Config) -> Iterator[None]:
    """Locks the directory for one process and this configuration.

    A run resumes with other values only of fields that do not affect what is
    trained: `search`, `devices`, the path of the data, the number of workers,
    the intervals of checkpoints and logs. The lock ends with the process, even
    if it is killed.

    Raises:
      ConfigError: if the directory cannot be written to, holds another
        configuration or other files, or is in use by another process; its
        files are unchanged then.
    """
    with contextlib.ExitStack() as held:
      on_first(lambda: self._claim(config, held))
      yield

  def _claim(self, config, held):
    try:
      self._check(config)
      self.path.mkdir(parents=True, exist_ok=True)
      lock = held.enter_context(files.open_append(self.path / "lock"))
      self._lock(lock)
      # Another process may have come and gone since.
      self._check(config)
      files.write_json(self.path / "config.json", dataclasses.asdict(config))
    except OSError as error:
      raise ConfigError(
        f"workdir {self.path} cannot be written to: {command.one_line(error)}"
      ) from None

  def _lock(self, file):
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(
        f"workdir {self.path} is in use by another process"
      ) from None

  def check_space(self, stages: Mapping[str, int]) -> None:
    """Checks that the disk has room for what the stages will write.

    Files that a stage has written already count towards its bytes.

    Args:
      stages: bytes that each writes at most, by name; finished ones need none.

    Raises:
      ConfigError: if the disk has too little room.
    """
    on_first(lambda: self._check_space(stages))

  def _check_space(self, stages):
    missing = {
      stage: max(size - _written(self.path / stage), 0)
      for stage, size in stages.items()
      if self.result(stage) is None
    }
    needed = sum(missing.values())
    free = shutil.disk_usage(self._above()).free
    if free < needed:
      raise ConfigError(
        f"workdir {self.path}: its disk has {free / 2**20:,.1f} MiB free, but "
        f"{', '.join(missing)} may take {needed / 2**20:,.1f} MiB more"
      )

  def _above(self):
    """The directory, or that in which it will be made."""
    path = self.path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())

  def _check_place(self):
    above = self._above()
    if not above.is_dir():
      reason = f"{above} is not a directory"
    elif not os.access(above, os.W_OK | os.X_OK):
      reason = f"{above}: {os.strerror(errno.EACCES)}"
    else:
      return
    raise ConfigError(f"workdir {self.path} cannot be written to: {reason}")

  def _check(self, config):
    self._check_place()
    path = self.path / "config.json"
    if path.exists():
      theirs = _renamed(_read_config(path))
      mine = json.loads(json.dumps(dataclasses.asdict(config)))
      for field in ("search", "checkpoint_every", "log_every"):
        mine[field] = theirs.get(field, mine[field])
      for group, field in _free(config):
        if field in theirs.get(group, {}):
          mine[group][field] = theirs[group][field]
      if theirs != mine:
        raise ConfigError(
          f"workdir {self.path} holds another configuration "
          f"({_first_difference(theirs, mine)}); use a new directory, or the "
          "same configuration"
        )
      return
    ours = (files.partial_path(path), self.path / "lock")
    entries = self.path.iterdir() if self.path.is_dir() else ()
    if any(entry not in ours for entry in entries):
      raise ConfigError(
        f"workdir {self.path} is not empty and holds no run; use a new or "
        "empty directory"
      )

  def record_network(self, stage: str, network: dict[str, Any]) -> None:
    """Records which network a stage trains, or checks that it is the same.

    Args:
      stage: its name.
      network: JSON that distinguishes networks with arrays of equal shapes.

    Raises:
      ConfigError: if the checkpoints there are of another network.
    """
    on_first(
      lambda: self._record_network(stage, json.loads(json.dumps(network)))
    )

  def _record_network(self, stage, network):
    path = self.path / stage / "network.json"
    if not path.exists():
      files.write_json(path, network)
      return
    theirs = read_object(path, advice="use a new directory")
    if theirs != network:
      raise ConfigError(
        f"{path}: checkpoints of another network "
        f"({_first_difference(theirs, network)}); use a new directory"
      )

  def result(self, stage: str) -> dict[str, Any] | None:
    """Returns the result of a stage, or None if it is not done.

    Every process must call this: the first one reads the file for all.
    """
    path = self.path / stage / "result.json"
    schema = schema_of(stage, self._bits)
    return on_first(
      lambda: read_object(path, schema) if path.exists() else None
    )

  def finished(self, stage: str) -> dict[str, Any]:
    """Returns the result of a stage that is done.

    Raises:
      ConfigError: if it is not done.
    """
    result = self.result(stage)
    if result is None:
      raise ConfigError(f"{self.path / stage} has no result.json; run again")
    return result

  def finish(self, stage: str, started: float, **result: Any) -> None:
    """Writes the result of a stage, with its seconds since `started`."""
    result["seconds"] = round(time.monotonic() - started, 1)
    on_first(
      lambda: files.write_json(self.path / stage / "result.json", result)
    )


def read_object(
  path: pathlib.Path,
  schema: Any = {...: object},  # noqa: B006
  *,
  advice: str = "delete it and run again",
) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    ConfigError: if the file cannot be read or holds anything else.
  """
  try:
    return files.read_json(path, schema)
  except OSError as error:
    raise ConfigError(f"{path}: {error.strerror}; {advice}") from None
  except ValueError as error:
    raise ConfigError(f"{error}; {advice}") from None


def _read_config(path):
  """Reads config.json, also of a version that had fewer groups of fields."""
  advice = "use a new directory"
  found = read_object(path, advice=advice)
  groups = {name: {...: object} for name in _GROUPS if name in found}
  return read_object(path, {**groups, ...: object}, advice=advice)


def _written(directory):
  """Bytes of the files in a directory and below it."""
  return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def _renamed(values):
  """Replaces former names of fields and values by their present ones."""
  data = dict(values.get("data", {}))
  if "damaged" in data:
    data["on_decode_error"] = data.pop("damaged")
  if data.get("name") == "generated":
    data["name"] = "synthetic"
  # Fields without an effect could once have any value.
  default = json.loads(json.dumps(dataclasses.asdict(DataConfig())))
  for field in dataclasses.fields(DataConfig):
    _, names = field.metadata.get("only_with", ("", (data.get("name"),)))
    if field.name in data and data.get("name") not in names:
      data[field.name] = default[field.name]
  return {**values, "data": data}


def _free(config):
  """Fields within groups that may change when a run resumes."""
  fields = [("data", "path"), ("data", "workers")]
  fields += [("devices", "bits"), ("devices", "parameters")]
  # Where arrays live changes the order of sums, unless norms see the devices.
  if config.devices.norm == "global":
    fields.append(("devices", "data"))
  return fields


def _first_difference(theirs, mine, prefix=""):
  for key in [*mine, *theirs]:
    a, b = theirs.get(key), mine.get(key)
    if isinstance(a, dict) and isinstance(b, dict) and a != b:
      return _first_difference(a, b, f"{prefix}{key}.")
    if a != b:
      return f"{prefix}{key} is {a!r} there, {b!r} here"
  return "they differ"
