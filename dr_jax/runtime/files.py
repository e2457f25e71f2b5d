"""Writes that are complete or absent.

A file is written under another name and renamed: a reader, or a process that
starts after a kill, sees the old content or the new, never a part of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import pathlib
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from typing import Any

Path = str | os.PathLike

# Suffix of a file that is being written; a kill can leave one behind.
PARTIAL = ".partial"


def expand(path: Path) -> pathlib.Path:
  """Returns a path with the user's directory in place of a leading "~".

  >>> expand("~/runs") == pathlib.Path.home() / "runs", expand("~a/b").parts
  (True, ('~a', 'b'))
  """
  return pathlib.Path(os.path.expanduser(path))


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file as a whole, and the directories that it needs.

  >>> import tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp()) / "a" / "b"
  >>> write_bytes(path, b"content")
  >>> path.read_bytes()
  b'content'
  """
  path = expand(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = partial_path(path)
  try:
    partial.write_bytes(content)
    partial.replace(path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def write_text(path: Path, text: str) -> None:
  """Writes a UTF-8 text file as a whole."""
  write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file as a whole.

  Raises:
    TypeError: if JSON cannot hold the value.
  """
  write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
  """Reads a JSON file.

  >>> import tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.json"
  >>> write_json(path, {"bits": [8, 4]})
  >>> read_json(path)
  {'bits': [8, 4]}

  Raises:
    ValueError: if it does not hold JSON, naming the file.
    FileNotFoundError: if there is no file.
  """
  try:
    return json.loads(expand(path).read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is damaged, it is not JSON: {error}") from None


def partial_path(path: Path) -> pathlib.Path:
  """Returns where a file is while it is being written."""
  path = pathlib.Path(path)
  return path.with_name(path.name + PARTIAL)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[pathlib.Path]:
  """A directory that appears at `path` when the block ends without an error.

  SIGTERM and SIGHUP, where nothing handles them, end the process as ever, but
  only after the draft is removed. What SIGKILL leaves, a hidden directory
  `.name.XXXXXXXX.partial`, is removed by the next call for the same path.

  Yields:
    Where to write its files until then.

  Raises:
    FileExistsError: if the path exists; nothing is overwritten.
  """
  path = expand(path)
  if path.exists():
    raise _exists(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
    _remove_abandoned(left)
  draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
  with _signals_raise():
    try:
      draft.mkdir()
      with _held(draft):
        yield draft
        _rename(draft, path)
    except BaseException:
      shutil.rmtree(draft, ignore_errors=True)
      raise


class _Killed(BaseException):
  """A signal arrived that ends the process."""


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
  """Delays signals that end the process until an exception has unwound."""
  numbers = []
  if threading.current_thread() is threading.main_thread():
    numbers = [
      number
      for number in (signal.SIGTERM, signal.SIGHUP)
      if signal.getsignal(number) is signal.SIG_DFL
    ]

  def stop(number, _):
    for other in numbers:
      signal.signal(other, signal.SIG_IGN)
    raise _Killed(number)

  for number in numbers:
    signal.signal(number, stop)
  try:
    yield
  except _Killed as killed:
    signal.signal(killed.args[0], signal.SIG_DFL)
    os.kill(os.getpid(), killed.args[0])
  finally:
    for number in numbers:
      signal.signal(number, signal.SIG_DFL)


def _rename(draft: pathlib.Path, path: pathlib.Path) -> None:
  try:
    draft.rename(path)
  except OSError as error:
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
      raise _exists(path) from None
    raise


def _exists(path: pathlib.Path) -> FileExistsError:
  return FileExistsError(f"{path} exists already; choose a new path")


@contextlib.contextmanager
def _held(directory: pathlib.Path) -> Iterator[None]:
  """Holds a lock on a directory, which ends with the process."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    # Not every file system has locks.
    with contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(descriptor)


def _remove_abandoned(draft: pathlib.Path) -> None:
  """Removes a draft whose writer was killed."""
  try:
    descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
  except OSError:
    return
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    shutil.rmtree(draft, ignore_errors=True)
  except OSError:  # Someone is writing it, or there are no locks.
    pass
  finally:
    os.close(descriptor)
