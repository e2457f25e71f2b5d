"""Stage export: the artifact, scored as it is read back from disk."""

from __future__ import annotations

import shutil
import time

from dr_jax import allocate, deploy
from dr_jax.pipeline import scoring
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.multi_precision import multi_precision_network
from dr_jax.pipeline.stages.search import found_allocations
from dr_jax.pipeline.stages.stage import Stage
from dr_jax.pipeline.stages.supernet import supernet
from dr_jax.pipeline.work import FORWARD, Work


def export(run: RunContext) -> None:
  """Writes the artifact and the allocations found, and verifies both.

  The artifact is that of the SuperNet if the run has one.

  Raises:
    deploy.ArtifactError: unless the artifact, read back, has the scores of the
      trained network, and those of every search.
  """
  started = time.monotonic()
  path = _path(run)
  if "supernet" in run.config.stages:
    source, network = "supernet", supernet(run)
  else:
    source, network = "multi_precision", multi_precision_network(run)
  if not path.exists():
    architecture = (run.config.model.name, run.model_options())
    deploy.save(path, network, architecture=architecture)
  artifact = deploy.open(path)
  loaded = artifact.load()
  scores = scoring.scores(run, loaded, run.bits)
  trained = run.workdir.finished(source)["scores"]
  if scores != trained:
    raise deploy.ArtifactError(
      f"{path} scores {scores}, but the trained network {trained}"
    )
  found = found_allocations(run)
  _write_allocations(run, path, loaded, found)
  run.workdir.finish(
    STAGE.name,
    started,
    scores=scores,
    allocations={name: row["allocation"] for name, row in found.items()},
    allocation_bytes={
      name: artifact.bytes_at(row["allocation"]) for name, row in found.items()
    },
    bytes_at={str(b): artifact.bytes_at(b) for b in artifact.bits},
    stored_bytes=artifact.stored_bytes,
    tensor_bytes=artifact.tensor_bytes,
    float_bytes=run.float_bytes(),
  )


def is_done(run: RunContext) -> bool:
  """Whether the artifact is intact and the allocations are the latest."""
  done = run.workdir.result(STAGE.name)
  found = found_allocations(run)
  latest = {name: row["allocation"] for name, row in found.items()}
  if done is None or done.get("allocations", {}) != latest:
    return False
  deploy.open(_path(run))
  return True


def _path(run):
  return run.workdir.path / STAGE.name / "model"


def _write_allocations(run, path, loaded, found):
  directory = path.parent / "allocations"
  if found:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
  for name, row in found.items():
    allocation = allocate.Allocation(row["allocation"])
    index = allocation.index(run.bits)
    score = scoring.scores(run, loaded, ("found",), indices=(index,))["found"]
    if score != row["test"]:
      raise deploy.ArtifactError(
        f"{path} scores {score} with {name}, but in the search {row['test']}"
      )
    allocation.save(directory / f"{name}.json")


def _work(run, table):
  """Scores of the artifact, at every bit-width and allocation."""
  del table
  count = len(run.bits)
  if "search" in run.config.stages:
    search = run.config.search
    count += len(search.strategies) * len(search.budgets)
  tests = len(run.data.test)
  return [Work(STAGE.name, "tests", count, count, tests, FORWARD)]


STAGE = Stage(
  name="export",
  help="write the integer artifact, and score it as read back from disk",
  run=export,
  needs=("multi_precision",),
  work=_work,
  single_process=True,
  is_done=is_done,
  # No more than the float network, and a manifest.
  disk_bytes=lambda run: run.float_bytes() + 2**20,
)
