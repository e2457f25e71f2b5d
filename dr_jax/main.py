"""The command: flags, configuration, pipeline.

python -m dr_jax.main --config=configs/digits.py [--workdir=DIR]
    [--config.train.epochs=5 ...]

On several machines, or with several processes on one, start the same command
everywhere, with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
set, or with --distributed where the cluster is one that JAX knows; see launch/.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings

import jax
from absl import app, flags, logging
from rich.console import Console

from dr_jax import pipeline, report
from dr_jax.config import ConfigError, from_dict
from dr_jax.config import flags as config_flags
from dr_jax.pipeline import comparison
from dr_jax.pipeline.stages import STAGES
from dr_jax.runtime import compilation, processes
from dr_jax.train import NonFiniteError

_CONFIG = config_flags.define(
  "config",
  "What to run. Its stages can be "
  + "; ".join(f"{stage.name}: {stage.help}" for stage in STAGES.values()),
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; runs/<name> by default."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Ask the cluster (Slurm, Open MPI, Cloud TPU, GKE) for the other processes.",
)
_PREEMPTED = flags.DEFINE_integer(
  "preempted_exit_code",
  0,
  "Exit code after SIGTERM, once the state is saved: 0, or what makes a "
  "scheduler start the command again.",
  lower_bound=0,
  upper_bound=255,
)


def main(argv: list[str]) -> int:
  """Runs the configuration; returns the exit code.

  0: finished, or stopped by SIGTERM after saving (another code with
  --preempted_exit_code). 1: training diverged. 2: bad input, or files that
  cannot be read or written. 3: another process has ended. 130: stopped by
  Ctrl-C, after saving unless it came twice. Whatever the code, the same command
  resumes from the last checkpoint.
  """
  # Orbax logs every file at INFO, and at ERROR, with a traceback, what it
  # raises as well.
  logging.set_verbosity(logging.FATAL)
  warnings.showwarning = _warn
  sys.unraisablehook = _unraisable
  try:
    if len(argv) > 1:
      raise ValueError(
        f"arguments must be flags, --name=value, got {argv[1]!r}"
      )
    if _CONFIG.value is None:
      raise ValueError("--config must name a configuration file")
    processes.initialize(detect=_DISTRIBUTED.value)
    tables, workdir = _run(config_flags.values(_CONFIG.value))
  except (Exception, KeyboardInterrupt) as error:
    return _end(error)
  if not processes.is_first():
    return 0
  # A file has no width; a table must not be cut there.
  console = Console(width=None if sys.stdout.isatty() else 160)
  for shown in tables:
    console.print(shown)
  print(f"workdir: {workdir}")
  return 0


def _end(error: BaseException) -> int:
  """Reports how a run ended in one line; returns the exit code.

  What nobody expected has its traceback.
  """
  several = jax.process_count() > 1
  code = processes.exit_code(error)
  if isinstance(error, KeyboardInterrupt):
    print("stopped at once; rerun the same command to resume", file=sys.stderr)
    return _leave(128 + signal.SIGINT)
  if number := getattr(error, "signal", None):
    print(f"{error}; rerun the same command to resume", file=sys.stderr)
    preempted = number == signal.SIGTERM
    return _PREEMPTED.value if preempted else 128 + number
  if processes.is_lost_peer(error):
    _report(f"another process has ended, or cannot be reached: {error}")
    return _leave(3)
  if isinstance(error, processes.SharedError | NonFiniteError):
    # All processes have it, and end alike.
    if code == 1 and error.__cause__ is not None:
      traceback.print_exception(error.__cause__)
    _report(error)
    return code
  if code == 2 or (several and isinstance(error, jax.errors.JaxRuntimeError)):
    _report(error)
    return _leave(code)
  if not several:
    raise error
  traceback.print_exception(error)
  return _leave(code)


def _run(values):
  """Runs a configuration, or a comparison; returns tables and directory."""
  compilation.cache_on_disk()
  if "methods" in values:
    if jax.process_count() > 1:
      raise ValueError("methods: a comparison must run in one process")
    compared = comparison.from_values(values)
    workdir = _workdir(compared.base.name)
    results = comparison.run(compared, workdir, interrupted=_on_signals())
    return [report.comparison_table(results)], workdir
  config = from_dict(values)
  workdir = _workdir(config.name)
  summary = pipeline.run(config, workdir, interrupted=_on_signals())
  tables = [report.summary_table(summary)]
  if search := summary["stages"].get("search"):
    tables.append(report.search_table(search["rows"], title="searches"))
  return tables, workdir


def _workdir(name):
  return os.path.expanduser(_WORKDIR.value or os.path.join("runs", name))


def _leave(code):
  """Ends with an error that other processes may know nothing of.

  The usual shutdown waits for them, who wait for this one; without it they
  notice. Where all have the same error, the first one leaves last: it is their
  only connection to each other.
  """
  if jax.process_count() > 1:
    sys.stdout.flush()
    sys.stderr.flush()
    if processes.is_first():
      time.sleep(5)
    os._exit(code)
  return code


def _report(error):
  print(f"error: {_one_line(error)}", file=sys.stderr)


def _warn(message, category, filename, lineno, file=None, line=None):
  print(f"warning: {_one_line(message)}", file=file or sys.stderr)


def _unraisable(unraisable):
  """Leaves out the writes that Orbax abandons when another one has failed.

  Each would end with a traceback, some time later.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _one_line(message):
  return " ".join(str(message).split()) or type(message).__name__


def _on_signals():
  """Installs handlers; returns a function that names a signal received.

  A second Ctrl-C does not wait. A second SIGTERM does: some schedulers send
  several, and the state is being saved already.
  """
  received: list[str] = []

  def handle(number, frame):
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append(signal.Signals(number).name)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, handle)
  return lambda: received[0] if received else None


def _parse(argv):
  """Parses flags; anything wrong is one line and exit code 2."""
  try:
    return config_flags.parse(argv)
  except ConfigError as error:
    _report(error)
    sys.exit(2)


if __name__ == "__main__":
  app.run(lambda argv: sys.exit(main(argv)), flags_parser=_parse)
