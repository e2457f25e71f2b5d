"""Failures of Orbax: known at once, and said by one exception."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import time
import traceback
import types
import warnings
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint
from orbax.checkpoint import v1 as ocp

_ORBAX = os.path.dirname(orbax.checkpoint.__file__)
# Of what was abandoned, after an error; others may go on and be waited for.
_LONGEST_READ_S = 2.0


def recording_handler(failed: list[Exception]) -> Any:
  """Returns a handler class that records an error of this process at once.

  Orbax raises it only when all processes have finished writing, and those that
  can write wait for this one.

  Args:
    failed: list to which errors are appended.
  """

  # Orbax marks it final, and offers no other way to see a process's error.
  class Arrays(ocp.handlers.PyTreeHandler):  # pyrefly: ignore
    async def save(self, directory, checkpointable):
      written = await super().save(directory, checkpointable)

      async def recorded():
        try:
          await written
        except Exception as error:
          failed.append(error)
          raise

      return recorded()

  return Arrays


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences the tracebacks that Orbax prints besides its exception.

  When one array of many cannot be read, Orbax raises and abandons the other
  reads; each of them then prints a traceback of its own when it is destroyed.
  They are destroyed here, if their bytes arrive in time.
  """
  asyncio_logger = logging.getLogger("asyncio")
  disabled, hook = asyncio_logger.disabled, sys.unraisablehook
  asyncio_logger.disabled, sys.unraisablehook = True, lambda unraisable: None
  try:
    yield
  except Exception as error:
    # What the frames of the exception refer to lives as long as it does.
    failed: BaseException | None = error
    while failed is not None:
      traceback.clear_frames(failed.__traceback__)
      failed = failed.__cause__ or failed.__context__
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
      until = time.monotonic() + _LONGEST_READ_S
      while _collected_reads() and time.monotonic() < until:
        time.sleep(0.05)
    raise
  finally:
    asyncio_logger.disabled, sys.unraisablehook = disabled, hook


def _collected_reads():
  """How many reads of Orbax are suspended, after those let go are destroyed."""
  gc.collect()
  return sum(
    type(found) is types.CoroutineType
    and found.cr_frame is not None
    and found.cr_code.co_filename.startswith(_ORBAX)
    for found in gc.get_objects()
  )
