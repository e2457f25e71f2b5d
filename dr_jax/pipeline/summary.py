"""Results of a run so far, and the environment that they come from."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import warnings
from typing import Any

import jax
import numpy as np

from dr_jax import report
from dr_jax.pipeline.context import RunContext


def summarize(run: RunContext) -> dict[str, Any]:
  """Returns the results so far by stage, and the environment."""
  return {
    "name": run.config.name,
    "task": run.data.task,
    "bits": run.bits,
    "stages": run.results,
    "environment": environment(),
  }


def write_page(directory: pathlib.Path) -> None:
  """Writes a page and figures from what a run or a comparison left there.

  Without the packages of the extra `report`, or with a damaged file, it only
  warns: all results are in files already.
  """
  try:
    report.write_page(directory)
  except (ImportError, ValueError) as error:
    warnings.warn(f"{directory / report.PAGE}: {error}", stacklevel=2)


def environment() -> dict[str, str]:
  """Returns the versions and the device of this process."""
  packages = ("dr_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
  versions = {}
  for package in packages:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = "not installed"
  return {
    "python": platform.python_version(),
    "numpy": np.__version__,
    **versions,
    "device": jax.devices()[0].device_kind,
    "backend": jax.default_backend(),
    "cpus": str(os.cpu_count()),
  }
