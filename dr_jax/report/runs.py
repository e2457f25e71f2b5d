"""What a run or a comparison left in its directory, checked.

A page is a function of these files alone, so that it can be made again from any
directory, without the network or the data.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from dr_jax.report import network_record
from dr_jax.report.comparison import Results, read_results
from dr_jax.report.results import schema_of
from dr_jax.runtime import files, schema
from dr_jax.runtime.metrics import RECORD
from dr_jax.runtime.schema import COUNT, Where
from dr_jax.runtime.tasks import TASKS

_SUMMARY = {
  "name": str,
  "task": Where(str, TASKS.__contains__, f"one of {', '.join(TASKS)}"),
  "bits": [COUNT],
  "stages": {...: {...: object}},
  "environment": {...: str},
}


class Run(NamedTuple):
  """A run whose stage `report` is done.

  Attributes:
    name, task, bits: its name, one of `runtime.tasks.TASKS`, and its candidate
      bit-widths, highest first.
    stages: results by name ("separate/8" among them).
    environment: versions and device, as words.
    config: its configuration, as nested dicts.
    metrics: lines of metrics.jsonl.
    network: what `network_record` says, or None.
  """

  name: str
  task: str
  bits: tuple[int, ...]
  stages: dict[str, dict[str, Any]]
  environment: dict[str, str]
  config: dict[str, Any]
  metrics: list[dict[str, Any]]
  network: dict[str, Any] | None


def is_comparison(directory: str | os.PathLike) -> bool:
  """Whether a directory has what `read_comparison` reads."""
  return (files.expand(directory) / "compare.json").exists()


def read_run(directory: str | os.PathLike) -> Run:
  """Reads the directory of a run.

  Raises:
    ValueError: if no run has ended there, or a file is damaged, naming it and
      the entry.
    OSError: if a file that every run has cannot be read.
  """
  directory = files.expand(directory)
  path = directory / "summary.json"
  if not path.exists():
    raise ValueError(
      f"{directory} must be the directory of a run whose stage report is done, "
      "but has no summary.json"
    )
  summary = files.read_json(path, _SUMMARY)
  bits = tuple(summary["bits"])
  for name, result in summary["stages"].items():
    try:
      schema.check(result, schema_of(name, bits), f"stages.{name}")
    except ValueError as error:
      raise ValueError(f"{path} is damaged: {error}") from None
  metrics, network = (
    directory / "metrics.jsonl",
    directory / network_record.FILE,
  )
  return Run(
    **summary | {"bits": bits},
    config=files.read_json(directory / "config.json", {...: object}),
    metrics=files.read_lines(metrics, RECORD) if metrics.exists() else [],
    network=files.read_json(network, network_record.schema_of(bits))
    if network.exists()
    else None,
  )


def read_comparison(directory: str | os.PathLike) -> Results:
  """Reads what a comparison found: see `comparison`.

  Raises:
    As `read_run`.
  """
  return read_results(files.expand(directory) / "compare.json")
