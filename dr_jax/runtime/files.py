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
import stat
import threading
from collections.abc import Iterator
from typing import IO, Any

from dr_jax.runtime import schema as schemas

Path = str | os.PathLike

# Suffix of a file that is being written; a kill can leave one behind.
PARTIAL = ".partial"
# Of a file that is read as a whole.
_LARGEST = 2**30


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
  _make_parents(path)
  partial = partial_path(path)
  # What a killed process left, or a link that someone put there.
  partial.unlink(missing_ok=True)
  try:
    with partial.open("xb") as file:
      file.write(content)
    partial.replace(path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def create_bytes(path: Path, content: bytes) -> None:
  """Writes a new file as a whole, and the directories that it needs.

  Raises:
    FileExistsError: if the path exists; nothing is overwritten.
  """
  check_absent(path)
  write_bytes(path, content)


def check_absent(path: Path) -> None:
  """Raises FileExistsError if the path exists."""
  path = expand(path)
  if os.path.lexists(path):
    raise _exists(path)


def size(path: Path) -> int:
  """Bytes of a file, or of the files in a directory."""
  path = expand(path)
  found = path.iterdir() if path.is_dir() else [path]
  return sum(file.stat().st_size for file in found)


def write_text(path: Path, text: str) -> None:
  """Writes a UTF-8 text file as a whole."""
  write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file as a whole.

  Raises:
    TypeError: if JSON cannot hold the value.
  """
  write_text(path, json.dumps(value, indent=2) + "\n")


def read_bytes(path: Path, *, limit: int) -> bytes:
  """Reads a regular file that has at most `limit` bytes.

  Raises:
    OSError: if it cannot be opened.
    ValueError: if it is something else, such as a FIFO or a device, or larger;
      nothing is read then.
  """
  with open_regular(path, os.O_RDONLY) as file:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
      raise ValueError(f"must have at most {limit} bytes, got {size}")
    return file.read(size)


@contextlib.contextmanager
def open_regular(path: Path, flags: int) -> Iterator[IO[bytes]]:
  """Opens a regular file, without waiting for anyone.

  Raises:
    OSError: if it cannot be opened.
    ValueError: if it is not a regular file.
  """
  # Opening a FIFO would wait for its other end.
  descriptor = os.open(
    expand(path), flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
  )
  # A file object of a directory is an error that names the descriptor.
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise ValueError("must be a regular file")
  mode = "rb" if flags & os.O_ACCMODE == os.O_RDONLY else "r+b"
  with os.fdopen(descriptor, mode) as file:
    yield file


def open_lines(path: Path, schema: Any) -> tuple[IO[str], list[Any]]:
  """Opens a file of JSON lines for appending, and reads what it has.

  The file and its directories are created if they are missing. An incomplete
  last line, of a process that was killed, is cut off, once all others proved
  to be what they must be: no file of someone else is changed.

  Args:
    path: the file.
    schema: of every line; see `runtime.schema`.

  Returns:
    The open file, and the values of its lines.

  Raises:
    OSError: if it cannot be opened, or is a link.
    ValueError: if it holds anything else, naming file and line.
  """
  path = expand(path)
  _make_parents(path)
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
  advice = "; delete it and run again"
  with _naming(path, advice), open_regular(path, flags) as file:
    content = file.read()
    complete = content.rfind(b"\n") + 1
    values = _parse_lines(path, content[:complete], schema)
    file.truncate(complete)
  return open_append(path), values


def open_append(path: Path) -> IO[str]:
  """Opens a text file for appending; it and its directories may be missing.

  Raises:
    OSError: if it cannot be opened, or is a link.
  """
  path = expand(path)
  _make_parents(path)
  flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
  return os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8")


def read_lines(path: Path, schema: Any) -> list[Any]:
  """Reads a file of JSON lines.

  Raises:
    OSError: if it cannot be opened.
    ValueError: if a line is not what it must be, naming file and line.
  """
  with _naming(path):
    return _parse_lines(path, read_bytes(path, limit=_LARGEST), schema)


def _parse_lines(path, content, schema):
  values = []
  for number, line in enumerate(content.splitlines(), start=1):
    try:
      values.append(schemas.parse(line))
      schemas.check(values[-1], schema)
    except ValueError as error:
      raise ValueError(f"line {number}: {error}") from None
  return values


def read_json(path: Path, schema: Any = object) -> Any:
  """Reads a JSON file, which nobody vouches for.

  Args:
    path: the file.
    schema: what it must hold; see `runtime.schema`.

  >>> import tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.json"
  >>> write_json(path, {"bits": [8, 4]})
  >>> read_json(path)
  {'bits': [8, 4]}

  Raises:
    ValueError: if it is not such JSON, naming the file and the entry.
    OSError: if it cannot be opened.
  """
  with _naming(path):
    value = schemas.parse(read_bytes(path, limit=_LARGEST))
    schemas.check(value, schema)
  return value


def _make_parents(path):
  """Makes the directories of a path; one that is a file is no FileExistsError.

  Whoever heard that a file exists would look for the path itself.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except FileExistsError:
    code = errno.ENOTDIR
    raise NotADirectoryError(
      code, os.strerror(code), str(path.parent)
    ) from None


@contextlib.contextmanager
def _naming(path, advice=""):
  """Names the file in errors about what it holds."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{path} is damaged: {error}{advice}") from None


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
  check_absent(path)
  _make_parents(path)
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

  inside = False

  def stop(number, _):
    if inside:
      for other in numbers:
        signal.signal(other, signal.SIG_IGN)
      raise _Killed(number)
    _die(number)

  try:
    for number in numbers:
      signal.signal(number, stop)
    inside = True
    yield
    inside = False
  except _Killed as killed:
    _die(killed.args[0])
  finally:
    inside = False
    for number in numbers:
      signal.signal(number, signal.SIG_DFL)


def _die(number: int) -> None:
  """Ends this process as a signal does that nothing handles."""
  signal.signal(number, signal.SIG_DFL)
  os.kill(os.getpid(), number)


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
