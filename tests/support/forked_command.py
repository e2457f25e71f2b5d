"""A command in forks of one interpreter that has loaded it already.

A fork parses its flags, writes and exits as `python -m dr_jax.NAME` does, but
starts in no time.
"""

import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import quick_compilation

ROOT = pathlib.Path(__file__).parents[2]
_SERVER = """
import importlib, json, os, sys
module = importlib.import_module(f"dr_jax.{sys.argv[1]}")

for line in sys.stdin:
  argv, *paths = json.loads(line)
  child = os.fork()
  if not child:
    for descriptor, path in enumerate(paths, start=1):
      os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [module.__file__, *argv]
    module.start()
  _, status = os.waitpid(child, 0)
  print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Ended(NamedTuple):
  """How a command ended, and what it wrote."""

  code: int
  out: str
  err: str


class ForkedCommand:
  """Runs a command to its end; close it when no more is to run."""

  def __init__(self, directory: pathlib.Path, name: str = "main"):
    self._files = directory / "out", directory / "err"
    self._server = subprocess.Popen(
      [sys.executable, "-c", _SERVER, name],
      cwd=ROOT,
      env=quick_compilation.environment(),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __call__(self, *argv: str) -> Ended:
    """Runs the command with these arguments."""
    request = [argv, *map(str, self._files)]
    self._server.stdin.write(json.dumps(request) + "\n")
    self._server.stdin.flush()
    code = int(self._server.stdout.readline())
    return Ended(code, *(file.read_text() for file in self._files))

  def close(self) -> None:
    self._server.communicate()
