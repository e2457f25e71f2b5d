"""Failures of Orbax: known at once, and said by one exception."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from orbax.checkpoint import v1 as ocp


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
  reads; each of them then prints a traceback.
  """
  asyncio_logger = logging.getLogger("asyncio")
  disabled, hook = asyncio_logger.disabled, sys.unraisablehook
  asyncio_logger.disabled, sys.unraisablehook = True, lambda unraisable: None
  try:
    yield
  except Exception:
    # Until the abandoned reads have ended, and Python has noticed.
    time.sleep(0.2)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
      gc.collect()
    raise
  finally:
    asyncio_logger.disabled, sys.unraisablehook = disabled, hook
