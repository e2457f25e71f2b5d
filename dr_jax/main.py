"""The command: flags, configuration, pipeline.

python -m dr_jax.main --config=configs/digits.py [--workdir=DIR]
    [--config.train.epochs=5 ...] [--dry_run]

With --help, it lists the stages and the fields of the configuration: the flag
of each with its value, its meaning, its range. With --dry_run, it checks all
that a run checks before it trains, and prints the configuration, the network,
memory and an estimate of the time; nothing is written. Missing data are then a
line of what it prints, not an error.

On several machines, or with several processes on one, start the same command
everywhere, with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
set, or with --distributed where the cluster is one that JAX knows; see launch/.

Exit codes; in every case the same command resumes from the last checkpoint:
    0: finished, or stopped by SIGTERM or SIGHUP after saving (unless
       --preempted_exit_code says otherwise); also after --help and --dry_run
    1: training diverged, or an error that nobody expected, with its traceback
    2: bad input, or files that cannot be read or written, standard output among
       them
    3: another process has ended
  130: stopped by Ctrl-C, after saving; at once by a second one, or before
       training
  141: finished, but whoever read standard output closed it
"""

from __future__ import annotations

from dr_jax.runtime import command

_RESUME = "rerun the same command to resume"

# The imports below take seconds.
if __name__ == "__main__":
  command.stop_on_interrupt(_RESUME)

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import textwrap
import time
import traceback
import warnings

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.measure import Measurement

from dr_jax import pipeline, report
from dr_jax.config import ConfigError, from_dict
from dr_jax.config import flags as config_flags
from dr_jax.config.help import describe, field_help
from dr_jax.pipeline import comparison, dry_run
from dr_jax.pipeline.stages import STAGES
from dr_jax.runtime import compilation, processes, sinks
from dr_jax.runtime.signals import STOPPING
from dr_jax.train import NonFiniteError

_CONFIG = config_flags.define(
  "config",
  "What to run: a file of a configuration, as FILE.py or FILE.py:ARGUMENT.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; runs/<name> by default."
)
_PROFILE = flags.DEFINE_integer(
  "profile",
  0,
  "Steps to profile of each stage that trains; traces for "
  "https://ui.perfetto.dev go to the directory profile of the run.",
  lower_bound=0,
)
_LOG_TO = flags.DEFINE_list(
  "log_to",
  [],
  f"Where numbers go besides metrics.jsonl: any of {', '.join(sinks.SINKS)}.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Ask the cluster (Slurm, Open MPI, Cloud TPU, GKE) for the other processes.",
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "Check all that a run checks before it trains; print the configuration, the "
  "network, memory and an estimate of the time; write nothing.",
)
_PREEMPTED = flags.DEFINE_integer(
  "preempted_exit_code",
  0,
  "Exit code after SIGTERM or SIGHUP, once the state is saved: 0, or what "
  "makes a scheduler start the command again.",
  lower_bound=0,
  upper_bound=255,
)


def main(argv: list[str]) -> int:
  """Runs the configuration; returns the exit code (see above)."""
  # Orbax logs every file at INFO, and at ERROR, with a traceback, what it
  # raises as well.
  logging.set_verbosity(logging.FATAL)
  warnings.showwarning = command.warn
  sys.unraisablehook = _unraisable
  try:
    command.check_arguments(argv)
    if _CONFIG.value is None:
      raise ValueError("--config must name a configuration file")
    if _DRY_RUN.value:
      text = _dry_run(config_flags.values(_CONFIG.value))
      return command.show(lambda: print(text))
    processes.initialize(detect=_DISTRIBUTED.value)
    tables, workdir = _run(config_flags.values(_CONFIG.value))
  except Exception as error:
    return _end(error)
  if not processes.is_first():
    return 0
  return _show(tables, workdir)


def _show(tables, workdir):
  """Prints what a run found; returns the exit code."""
  return command.show(lambda: _print(tables, workdir), workdir)


def _print(tables, workdir):
  for shown in tables:
    # A table that is wider than the terminal wraps; cells are not cut.
    console = _Console(width=160)
    wide = Measurement.get(console, console.options, shown).maximum
    if sys.stdout.isatty():
      wide = max(wide, Console().width)
    _Console(width=max(wide, 1)).print(shown, soft_wrap=True)
  print(f"workdir: {workdir}")


class _Console(Console):
  def on_broken_pipe(self) -> None:
    """Leaves the error to the caller, where rich would end the process."""
    raise


def _end(error: Exception) -> int:
  """Reports how a run ended in one line; returns the exit code.

  What nobody expected has its traceback.
  """
  several = jax.process_count() > 1
  code = processes.exit_code(error)
  if number := getattr(error, "signal", None):
    command.say(f"{error}; {_RESUME}")
    preempted = number in (signal.SIGTERM, signal.SIGHUP)
    return _PREEMPTED.value if preempted else 128 + number
  if processes.is_lost_peer(error):
    command.report(f"another process has ended, or cannot be reached: {error}")
    return _leave(3)
  if isinstance(error, processes.SharedError | NonFiniteError):
    # All processes have it, and end alike.
    if code == 1 and error.__cause__ is not None:
      traceback.print_exception(error.__cause__)
    command.report(error)
    return code
  if code == 2 or (several and isinstance(error, jax.errors.JaxRuntimeError)):
    command.report(error)
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
    for flag, only in ((_PROFILE, 0), (_LOG_TO, [])):
      if flag.value != only:
        raise ValueError(
          f"{flag.name} must be {only} with a comparison, got {flag.value}"
        )
    compared = comparison.from_values(values)
    workdir = _workdir(compared.base.name)
    results = comparison.run(compared, workdir, interrupted=_on_signals())
    return [report.comparison_table(results)], workdir
  config = from_dict(values)
  workdir = _workdir(config.name)
  with contextlib.ExitStack() as stack:
    logged = sinks.make(_LOG_TO.value, workdir, dataclasses.asdict(config))
    for sink in logged:
      stack.callback(sink.close)
    summary = pipeline.run(
      config,
      workdir,
      interrupted=_on_signals(),
      profile=_PROFILE.value,
      sinks=logged,
    )
  tables = [report.summary_table(summary)]
  if search := summary["stages"].get("search"):
    rows, task = search["rows"], summary["task"]
    tables.append(report.search_table(rows, task, title="searches"))
  return tables, workdir


def _dry_run(values):
  """Says what a configuration, or a comparison, would do."""
  if "methods" in values:
    compared = comparison.from_values(values)
    return dry_run.describe_comparison(compared, _workdir(compared.base.name))
  config = from_dict(values)
  return dry_run.describe(config, _workdir(config.name))


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


def _unraisable(unraisable):
  """Leaves out the writes that Orbax abandons when another one has failed.

  Each would end with a traceback, some time later.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _on_signals():
  """Installs handlers; returns a function that names a signal received.

  A second Ctrl-C does not wait. A second SIGTERM does: some schedulers send
  several, and the state is being saved already. What whoever started the
  process has it ignore, as nohup does SIGHUP, stays ignored.
  """
  received: list[str] = []

  def handle(number, frame):
    if received and number == signal.SIGINT:
      command.stop_at_once(number, _RESUME)
    received.append(signal.Signals(number).name)

  for number in STOPPING:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, handle)
  return lambda: received[0] if received else None


def _parse(argv):
  """Parses flags; anything wrong is one line and exit code 2.

  With --help, which can be anywhere among them, the process ends with it.
  """
  argv, help_wanted = command.without_help(argv)
  try:
    arguments = config_flags.parse(argv)
    if help_wanted:
      sys.exit(command.show(_print_help))
    return arguments
  except ConfigError as error:
    command.report(error)
    sys.exit(2)


def _print_help():
  """Prints the stages, and the fields of a configuration or the flags."""
  width = shutil.get_terminal_size().columns
  widest = max(map(len, STAGES))
  stages = [
    textwrap.fill(
      f"  {stage.name.ljust(widest)}  {stage.help}",
      max(width, 2 * widest),
      subsequent_indent=" " * (widest + 4),
      break_on_hyphens=False,
    )
    for stage in STAGES.values()
  ]
  if _CONFIG.value is None:
    app.usage(shorthelp=True, writeto_stdout=True)
    print("Stages of a configuration:", *stages, sep="\n")
    print("\nWith --config=FILE, --help shows the fields of the configuration.")
    return
  print("Stages, of which --config.stages names some:", *stages, "", sep="\n")
  values = config_flags.values(_CONFIG.value)
  compares, config = "methods" in values, None
  try:
    if compares:
      comparison.from_values(values)
    else:
      config = from_dict(values)
  except ConfigError as error:
    print(f"The configuration is not valid: {error}\n")
  fields = comparison.FIELDS if compares else field_help()
  print(describe(values, config, fields, width=width))
  print("\nWithout --config, --help shows the other flags.")


def start() -> None:
  """Runs the command with the arguments of this process, and ends it."""
  command.run(
    lambda: app.run(lambda argv: sys.exit(main(argv)), flags_parser=_parse)
  )


if __name__ == "__main__":
  start()
