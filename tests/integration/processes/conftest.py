"""Several real processes on loopback, each the command as users start it."""

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """Directory of compiled programs."""
  return tmp_path_factory.mktemp("cache")
