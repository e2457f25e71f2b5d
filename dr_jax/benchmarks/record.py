"""Ratios of a run of the benchmarks, as a file of JSON.

  {"date": "2026-11-28", "commit": "8d6443a", "machine": "AMD EPYC, 2 cores",
   "quick": true, "environment": {"jax": "0.10.2", ...},
   "ratios": {"hessian": {"forward over reverse of gradient": 2.07}}}

Both things that a ratio compares were measured in that run; less is better.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

from dr_jax.pipeline.summary import environment

Ratios = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Record:
  """What one run measured, and where.

  Attributes:
    date: of the run, YYYY-MM-DD.
    commit: of the code, with a "+" where files differ from it; "unknown"
      outside of a checkout.
    machine: its processor and the number of its cores.
    quick: whether the benchmarks were made small; others do not compare.
    environment: versions and device.
    ratios: {benchmark: {name: ratio}}.
  """

  date: str
  commit: str
  machine: str
  quick: bool
  environment: dict[str, str]
  ratios: Ratios

  def write(self, path: pathlib.Path) -> None:
    """Writes the file."""
    text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def now(quick: bool, ratios: Ratios) -> Record:
  """The record of these ratios, on this machine, today."""
  return Record(
    datetime.date.today().isoformat(),
    _commit(),
    f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
    quick,
    environment(),
    ratios,
  )


def read(path: pathlib.Path) -> Record:
  """Reads a file.

  Raises:
    ValueError: naming the file and the field, if it is none of these files.
    OSError: if it cannot be read.
  """
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except ValueError:
    raise ValueError(f"{path} must be JSON of a run of benchmarks") from None
  for field in dataclasses.fields(Record):
    value = found.get(field.name) if isinstance(found, dict) else None
    if not _fits(field.name, value):
      raise ValueError(
        f"{path} must be JSON of a run of benchmarks, got {field.name}="
        f"{value!r}"
      )
  return Record(**{f.name: found[f.name] for f in dataclasses.fields(Record)})


def _fits(name: str, value: Any) -> bool:
  kind = {"quick": bool, "environment": dict, "ratios": dict}.get(name, str)
  if name != "ratios":
    return isinstance(value, kind)
  return isinstance(value, dict) and all(
    isinstance(part, dict)
    and all(isinstance(ratio, int | float) for ratio in part.values())
    for part in value.values()
  )


def _commit() -> str:
  def git(*arguments):
    return subprocess.run(
      ["git", *arguments],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  try:
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _processor() -> str:
  """Its name where Linux tells it, else its architecture."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
  except OSError:
    return platform.machine()
  lines = text.splitlines()
  names = [line.partition(":")[2] for line in lines if "model name" in line]
  return names[0].strip() if names else platform.machine()
