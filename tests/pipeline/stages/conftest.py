"""A finished mixed-precision run, trained once for all tests of stages."""

import fcntl
import os
import shutil
import warnings

import mixed_job
import pytest
import quick_compilation

from dr_jax import pipeline


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
  """(directory, summary) of a finished run; copy the directory to change it."""
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent
  shared = root / "mixed_job"
  # One worker trains, others find everything done.
  with (root / "mixed_job.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    # As the tests that repeat parts of it, of which none is begun yet.
    with quick_compilation.used(), warnings.catch_warnings():
      # Eight probes leave the traces uncertain.
      warnings.simplefilter("ignore")
      summary = pipeline.run(mixed_job.config(), shared)
    mine = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(shared, mine)
  return mine, summary


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of the finished run's directory, to change."""
  return shutil.copytree(finished[0], tmp_path / "run")
