"""Several real processes of one program that connect on this machine.

Each is bound to one core and computes with one thread, so that more of them
are more cores at work, and not more threads on the same ones.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

_SECONDS = 600
# A flag of XLA.
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def cores() -> list[int]:
  """The cores that this process may use."""
  if not hasattr(os, "sched_getaffinity"):
    return list(range(os.cpu_count() or 1))
  return sorted(os.sched_getaffinity(0))


def run(module: str, arguments: Sequence[str], count: int) -> str:
  """Runs a module in processes that `processes.initialize` brings together.

  Process n is bound to the n-th core, beginning again when there are no more.

  Args:
    module: dotted name of what `python -m` runs.
    arguments: its command line.
    count: number of processes.

  Returns:
    What the first process wrote to its standard output.

  Raises:
    ValueError: if one of them fails, with the last line that it wrote; the
      others are ended.
  """
  command = [sys.executable, "-m", module, *arguments]
  address, available = _address(), cores()
  with contextlib.ExitStack() as stack:
    files, running = [], []
    for number in range(count):
      files.append(
        stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
      )
      with _bound_to(available[number % len(available)]):
        process = subprocess.Popen(
          command,
          env=os.environ | _variables(address, count, number),
          stdout=subprocess.PIPE if number == 0 else subprocess.DEVNULL,
          stderr=files[-1],
          text=True,
        )
      stack.callback(_end, process)
      running.append(process)
    _wait(running, files)
    return running[0].stdout.read()


def _variables(address, count, number):
  together = count > 1
  return {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip(),
    # The size of XLA's pool of threads. With a single one, a collective could
    # wait for a thread that waits for the collective.
    "NPROC": "4",
    # Empty, they hide what this process was given itself.
    "JAX_COORDINATOR_ADDRESS": address if together else "",
    "JAX_NUM_PROCESSES": str(count) if together else "",
    "JAX_PROCESS_ID": str(number) if together else "",
  }


def _wait(running, files):
  """Waits for all; raises ValueError as soon as one fails."""
  deadline = time.monotonic() + _SECONDS
  while any(process.poll() is None for process in running):
    if time.monotonic() > deadline:
      raise ValueError(
        f"processes={len(running)}: not ready after {_SECONDS} s; use fewer, "
        "or fewer steps"
      )
    if any(process.poll() for process in running):
      break
    time.sleep(0.05)
  for process, file in zip(running, files, strict=True):
    if process.poll():
      file.seek(0)
      lines = file.read().strip().splitlines() or ["nothing"]
      raise ValueError(
        f"processes={len(running)}: one ended with code {process.returncode} "
        f"and said: {lines[-1]}"
      )


def _end(process):
  process.kill()
  process.wait()
  if process.stdout is not None:
    process.stdout.close()


def _address():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def _bound_to(core: int) -> Iterator[None]:
  """Binds this thread, and processes that it starts, to one core."""
  if not hasattr(os, "sched_setaffinity"):
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {core})
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)
