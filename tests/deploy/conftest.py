"""Artifacts of a small network, for tests of serving; they only read them."""

import gc
import itertools

import jax
import pytest
from small_artifact import SERVED, save

from dr_jax import allocate, deploy, quant


@pytest.fixture(scope="session")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("switchable") / "model"
  save(path, quant.double_rounding(SERVED), "switchable")
  return path


@pytest.fixture(scope="session")
def nested(tmp_path_factory):
  """Where codes are stored as planes."""
  path = tmp_path_factory.mktemp("nested") / "model"
  weight = quant.double_rounding(SERVED, rounding="half_up")
  save(path, weight, "switchable")
  return path


@pytest.fixture(scope="module")
def artifact(path):
  return deploy.open(path)


@pytest.fixture(scope="module")
def mixed(artifact):
  """An allocation of every candidate."""
  names = [layer["name"] for layer in artifact.manifest["layers"]]
  return allocate.Allocation(
    dict(zip(names, itertools.cycle((4, 8, 2)), strict=False))
  )


@pytest.fixture
def served(artifact):
  return deploy.Switchable(artifact)


@pytest.fixture
def live_bytes():
  """Counts the bytes of all arrays on devices."""

  def count():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())

  return count
