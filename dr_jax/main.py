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
from ml_collections import config_dict, config_flags
from rich.console import Console
from rich.table import Table

from dr_jax import pipeline, report
from dr_jax.checkpoint.checkpoints import CheckpointError
from dr_jax.config import from_dict
from dr_jax.pipeline import comparison
from dr_jax.runtime import compilation, processes
from dr_jax.train import InterruptedRun, NonFiniteError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="What to run.")
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
  goes on from the last checkpoint.
  """
  # Orbax tells every file at INFO, and at ERROR, with a traceback, what it
  # raises as well.
  logging.set_verbosity(logging.FATAL)
  warnings.showwarning = _warn
  sys.unraisablehook = _unraisable
  try:
    if len(argv) > 1:
      raise ValueError(f"argument {argv[1]!r}: allowed are --flags")
    if _CONFIG.value is None:
      raise ValueError("--config: missing; allowed is a configuration file")
    processes.initialize(detect=_DISTRIBUTED.value)
    tables, workdir = _run(_CONFIG.value.to_dict())
  except processes.FirstProcessError as error:
    return _fail(error, _stopped_by(error.signal) if error.signal else 2)
  except (ValueError, OSError, CheckpointError) as error:
    return _leave(error, 2)
  except NonFiniteError as error:
    return _fail(error, 1)
  except InterruptedRun as error:
    print(error, file=sys.stderr)
    return _stopped_by(error.signal)
  except KeyboardInterrupt:
    print(
      "stopped at once; the same command goes on from the last checkpoint",
      file=sys.stderr,
    )
    return _leave(None, 128 + signal.SIGINT)
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    words = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    if not any(word in str(error) for word in words):
      return _leave(error, 1)
    text = f"another process has ended, or cannot be reached: {error}"
    return _leave(text, 3)
  except Exception:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    return _leave(None, 1)
  if not processes.is_first():
    return 0
  # A file has no width; a table must not be cut there.
  console = Console(width=None if sys.stdout.isatty() else 160)
  for shown in tables:
    console.print(shown)
  print(f"workdir: {workdir}")
  return 0


def _run(values):
  """Runs a configuration, or a comparison; returns tables and directory."""
  compilation.cache_on_disk()
  if "methods" in values:
    if jax.process_count() > 1:
      raise ValueError("methods: a comparison; allowed is one process")
    compared = comparison.from_values(values)
    workdir = _WORKDIR.value or os.path.join("runs", compared.base.name)
    results = comparison.run(compared, workdir, interrupted=_on_signals())
    return [comparison.table(results)], workdir
  config = from_dict(values)
  workdir = _WORKDIR.value or os.path.join("runs", config.name)
  summary = pipeline.run(config, workdir, interrupted=_on_signals())
  tables = [table(summary)]
  if search := summary["stages"].get("search"):
    tables.append(report.pareto_table(search["rows"], title="searches"))
  return tables, workdir


def table(summary: dict) -> Table:
  """Bit-width, accuracy and size, against the float network."""
  stages = summary["stages"]
  separate = any(name.startswith("separate/") for name in stages)
  export = stages.get("export")
  columns = ["bits", "accuracy %", "cross-entropy", "bytes", "of float %"]
  shown = Table(*columns, title=summary["name"])
  if separate:
    shown.add_column("separate LSQ %")
  for column in shown.columns:
    column.justify = "right"
  if "pretrain" in stages:
    score = stages["pretrain"]["scores"]["float"]
    size = export and export["float_bytes"]
    shown.add_row(*_row("float", score, size, size))
  for bits in summary["bits"]:
    result = export or stages.get("supernet") or stages.get("multi_precision")
    alone = stages.get(f"separate/{bits}")
    row = [str(bits)] + [""] * 4
    if result is not None:
      size = export and export["bytes_at"][str(bits)]
      whole = export and export["float_bytes"]
      row = _row(str(bits), result["scores"][str(bits)], size, whole)
    if alone is not None:
      row.append(f"{alone['scores'][str(bits)]['accuracy']:.2f}")
    shown.add_row(*row)
  if export:
    stored, whole = export["stored_bytes"], export["float_bytes"]
    shown.caption = (
      f"one artifact of {stored:,} bytes, {100 * stored / whole:.1f} % of "
      "float, serves every bit-width"
    )
  return shown


def _row(name, score, size, whole):
  return [
    name,
    f"{score['accuracy']:.2f}",
    f"{score['loss']:.4f}",
    f"{size:,}" if size else "",
    f"{100 * size / whole:.1f}" if size else "",
  ]


def _leave(error, code):
  """Ends with an error that other processes may know nothing of.

  The usual goodbye waits for them, who wait for this one; without it they
  notice. Where all have the same error, the first leaves last: it is their
  only way to each other.
  """
  if error is not None:
    _fail(error, code)
  if jax.process_count() > 1 and not getattr(error, "told", False):
    sys.stdout.flush()
    sys.stderr.flush()
    if processes.is_first():
      time.sleep(5)
    os._exit(code)
  return code


def _stopped_by(number):
  if number == signal.SIGTERM:
    return _PREEMPTED.value
  return 128 + number


def _fail(error, code):
  print(f"error: {_one_line(error)}", file=sys.stderr)
  return code


def _warn(message, category, filename, lineno, file=None, line=None):
  print(f"warning: {_one_line(message)}", file=file or sys.stderr)


def _unraisable(unraisable):
  """Leaves out the writes that Orbax abandons when another one has failed.

  Each ends with a traceback of its own, some time later.
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
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    sys.exit(_fail(_unknown_field(argv) or error, 2))
  except (flags.Error, TypeError, ValueError) as error:
    sys.exit(_fail(_own_words(error), 2))
  except (OSError, ImportError) as error:
    sys.exit(_fail(f"--config: {error}", 2))


def _own_words(error):
  """What a configuration file raised, without the traceback around it."""
  text = str(error).strip()
  if "Traceback (most recent call last)" not in text:
    return text
  return f"--config={text.splitlines()[-1].partition(': ')[2]}"


def _unknown_field(argv):
  """Describes the first --config.x.y that the file does not have, if any."""
  overrides = [a for a in argv if a.lstrip("-").startswith("config.")]
  # Parse the rest alone, to see the file; config_flags looks at sys.argv.
  sys.argv = [a for a in argv if a not in overrides]
  flags.FLAGS(sys.argv, known_only=True)
  for override in overrides:
    node = _CONFIG.value
    for key in override.partition("=")[0].split(".")[1:]:
      if not isinstance(node, config_dict.ConfigDict):
        return f"{override}: {key!r} is below a plain value; allowed is a field"
      if key not in node:
        return f"{override}: no field {key!r}; allowed are {', '.join(node)}"
      node = node[key]
  return None


if __name__ == "__main__":
  app.run(lambda argv: sys.exit(main(argv)), flags_parser=_parse)
