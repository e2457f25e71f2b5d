"""A disk that is full after some bytes of each file."""

import contextlib
import resource


@contextlib.contextmanager
def full_after(count):
  """Makes this process's writes fail beyond so many bytes of a file."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
