"""The stages of a run, each resumable and skipped when done.

pretrain         the float network
multi_precision  joint quantization-aware training of all bit-widths
separate         one LSQ run per bit-width, for comparison
hessian          traces of the float network, by layer
supernet         the multi-precision network, trained for mixed bits
search           allocations of bits under budgets
export           the integer artifact, and its accuracy read back from disk
report           the table, and summary.json
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from dr_jax import allocate, deploy, train
from dr_jax import report as reports
from dr_jax.config import Config, QuantConfig
from dr_jax.pipeline.context import Run
from dr_jax.pipeline.stages import mixed_precision
from dr_jax.pipeline.workdir import write_json
from dr_jax.runtime import processes


def run(
  config: Config,
  workdir: str | os.PathLike,
  *,
  interrupted: Callable[[], str | None] = lambda: None,
  start: nnx.Module | None = None,
) -> dict[str, Any]:
  """Runs the stages that a configuration names, in order.

  Args:
    config: what to run.
    workdir: directory of this run; the same configuration goes on where it
      stopped.
    interrupted: returns the name of a signal that asks to stop, else None.
    start: a trained float network, in place of the stage pretrain.

  Returns:
    The summary: what summary.json holds.

  Raises:
    ConfigError: if the configuration does not fit the data, or the directory
      belongs to another configuration, cannot be written to or has too little
      room; nothing is overwritten.
    CheckpointError: if a state cannot be saved or restored.
    ValueError: from the library, for values that are not allowed.
    train.NonFiniteError, train.InterruptedRun: see `train.Loop`.
  """
  job = Run(config, workdir, interrupted, start=start)
  if "search" in config.stages:
    mixed_precision.check(job)
  with job.workdir.claim(config):
    job.check_space()
    for stage in config.stages:
      _STAGES[stage](job)
    return summary(job)


def pretrain(job: Run) -> None:
  """Trains the float network."""
  if job.workdir.result("pretrain") is None:
    job.float_network()


def multi_precision(job: Run) -> None:
  """Trains one network at all bit-widths jointly, from the float one."""
  if job.workdir.result("multi_precision") is None:
    job.multi_precision_network()


def separate(job: Run) -> None:
  """Trains one LSQ network per bit-width with the same recipe."""
  alone = train.RECIPES["lsq"]
  recipe = dataclasses.replace(
    job.config.train,
    schedule=alone.schedule,
    vectorize="auto",
    sampling=alone.sampling,
    distillation=alone.distillation,
    alrs=alone.alrs,
    loss_weights=(),
    curriculum=alone.curriculum,
  )
  for bits in job.bits:
    stage = f"separate/{bits}"
    if job.workdir.result(stage) is None:
      one = QuantConfig(
        bits=(bits,), weight=alone.weight, activation=alone.activation
      )
      job.quantized(stage, one, recipe)


def hessian(job: Run) -> None:
  """Estimates the traces of the float network's Hessian."""
  if job.workdir.result("hessian") is None:
    _alone(job, mixed_precision.traces, supernet=False)


def supernet(job: Run) -> None:
  """Trains the multi-precision network for bits that differ by layer."""
  if job.workdir.result("supernet") is None:
    mixed_precision.supernet(job)


def search(job: Run) -> None:
  """Searches for allocations of bits under budgets."""
  _alone(job, mixed_precision.search)


def export(job: Run) -> None:
  """Writes the artifact and evaluates it, read back from disk.

  It is the SuperNet's if there is one; beside it lie the allocations found.
  """
  _alone(job, _export)


def _alone(job, stage, *, supernet=True):
  """Makes the first process do a stage, once all have the networks."""
  if jax.process_count() > 1:
    job.float_network()
    job.multi_precision_network()
    if supernet and "supernet" in job.config.stages:
      mixed_precision.supernet(job)

  def call():
    stage(job)

  processes.on_first(call)


def _export(job):
  path = job.workdir.path / "export" / "model"
  found = mixed_precision.allocations(job)
  done = job.workdir.result("export")
  chosen = {name: row["allocation"] for name, row in found.items()}
  if done is not None and done.get("allocations", {}) == chosen:
    deploy.read(path)
    return
  started = time.monotonic()
  if "supernet" in job.config.stages:
    source, network = "supernet", mixed_precision.supernet(job)
  else:
    source, network = "multi_precision", job.multi_precision_network()
  architecture = (job.config.model.name, job.model_options())
  if not path.exists():
    deploy.save(path, network, architecture=architecture)
  loaded = deploy.load(path)
  scores = job.scores(loaded, job.bits)
  trained = job.workdir.result(source)["scores"]
  if scores != trained:
    raise deploy.ArtifactError(
      f"{path}: scores {scores}, but the trained network {trained}"
    )
  allocations = path.parent / "allocations"
  if found:
    shutil.rmtree(allocations, ignore_errors=True)
    allocations.mkdir()
  for name, row in found.items():
    _check_allocation(job, path, loaded, name, row)
    allocate.Allocation(row["allocation"]).save(allocations / f"{name}.json")
  job.workdir.finish(
    "export",
    started,
    scores=scores,
    allocations=chosen,
    allocation_bytes={
      name: deploy.size(path, row["allocation"]) for name, row in found.items()
    },
    bytes_at={str(b): n for b, n in deploy.sizes(path).items()},
    stored_bytes=sum(file.stat().st_size for file in path.iterdir()),
    tensor_bytes=sum(tensor.nbytes for tensor in deploy.read(path)[1].values()),
    float_bytes=job.float_bytes(),
  )


def _check_allocation(job, path, loaded, name, row):
  """Raises unless the artifact scores as the search said."""
  index = allocate.Allocation(row["allocation"]).index(job.bits)
  score = job.scores(loaded, ("found",), indices=(index,))["found"]
  if score != row["test"]:
    raise deploy.ArtifactError(
      f"{path}: scores {score} with {name}, but in the search {row['test']}"
    )


def report(job: Run) -> None:
  """Writes summary.json, and a plot of what searches found."""
  processes.on_first(lambda: _report(job))


def _report(job):
  search = job.workdir.result("search")
  if search is not None:
    place = job.workdir.path / "report"
    place.mkdir(exist_ok=True)
    reports.plot_pareto(place / "pareto.png", search["rows"])
  write_json(job.workdir.path / "summary.json", summary(job))


def summary(job: Run) -> dict[str, Any]:
  """What has been reached so far, by stage, and the environment."""
  stages = [s for s in job.config.stages if s not in ("separate", "report")]
  stages += [f"separate/{bits}" for bits in job.bits]
  results = {stage: job.workdir.result(stage) for stage in stages}
  return {
    "name": job.config.name,
    "bits": job.bits,
    "stages": {s: r for s, r in results.items() if r is not None},
    "environment": environment(),
  }


_STAGES = {
  "pretrain": pretrain,
  "multi_precision": multi_precision,
  "separate": separate,
  "hessian": hessian,
  "supernet": supernet,
  "search": search,
  "export": export,
  "report": report,
}


def environment() -> dict[str, str]:
  """Versions and device of this process."""
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
