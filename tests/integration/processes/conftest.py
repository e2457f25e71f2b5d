"""Several real processes on loopback, each the command as users start it."""

import pytest


@pytest.fixture(autouse=True)
def strict_numerics():
  """Training runs as users run it."""
  yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """Directory of compiled programs."""
  return tmp_path_factory.mktemp("cache")
