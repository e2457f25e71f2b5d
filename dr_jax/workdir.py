"""The directory of a run: whose it is, and what its stages have reached.

A stage is done when its `result.json` is there. Every file is complete or
absent; what belongs to another configuration is never overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from dr_jax.config import Config, ConfigError


class Workdir:
  """One run's directory.

  Attributes:
    path: the directory.
    metrics: its file of numbers, JSON lines.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.metrics = self.path / "metrics.jsonl"

  def claim(self, config: Config) -> None:
    """Writes config.json, or checks that it is this configuration.

    Only the field `search` may be another one: it changes nothing of what was
    trained.

    Raises:
      ConfigError: if the directory holds another one, or other files.
    """
    path = self.path / "config.json"
    mine = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
      try:
        theirs = json.loads(path.read_text())
      except ValueError:
        raise ConfigError(
          f"{path}: damaged, no JSON; allowed is a new directory"
        ) from None
      fixed = {**mine, "search": theirs.get("search")}
      if theirs != fixed:
        raise ConfigError(
          f"workdir={self.path}: holds another configuration "
          f"({_first_difference(theirs, fixed)}); allowed is a new directory, "
          "or the same configuration"
        )
      if theirs != mine:
        write_json(path, mine)
      return
    entries = self.path.iterdir() if self.path.is_dir() else ()
    if any(entry != _draft(path) for entry in entries):
      raise ConfigError(
        f"workdir={self.path}: is not empty and holds no run; allowed is a "
        "new or empty directory"
      )
    write_json(path, mine)

  @contextlib.contextmanager
  def alone(self) -> Iterator[None]:
    """Keeps other processes out of the directory; a kill lets them in.

    Raises:
      ConfigError: if another process is at work in it.
    """
    with (self.path / "lock").open("w") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        raise ConfigError(
          f"workdir={self.path}: another process is at work in it; allowed "
          "is one at a time"
        ) from None
      yield

  def result(self, stage: str) -> dict[str, Any] | None:
    """What a stage has reached, or None if it is not done."""
    path = self.path / stage / "result.json"
    return json.loads(path.read_text()) if path.exists() else None

  def finish(self, stage: str, started: float, **result: Any) -> None:
    """Ends a stage: what it has reached, and its seconds since `started`."""
    seconds = round(time.monotonic() - started, 1)
    write_json(
      self.path / stage / "result.json", {**result, "seconds": seconds}
    )


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file that is complete or absent."""
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = _draft(path)
  draft.write_text(json.dumps(value, indent=2) + "\n")
  draft.replace(path)


def _draft(path):
  return path.with_name(path.name + ".partial")


def _first_difference(theirs, mine, prefix=""):
  for key in [*mine, *theirs]:
    a, b = theirs.get(key), mine.get(key)
    if isinstance(a, dict) and isinstance(b, dict) and a != b:
      return _first_difference(a, b, f"{prefix}{key}.")
    if a != b:
      return f"{prefix}{key} is {a!r} there, {b!r} here"
  return "they differ"
