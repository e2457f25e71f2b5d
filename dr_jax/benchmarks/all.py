"""The benchmarks that guard what this library promises, in one run.

  python -m dr_jax.benchmarks.all --quick [--output=FILE]
  python -m dr_jax.benchmarks.all --quick --against=FILE [--threshold=1.5]

Runs each as its own command, one after the other, and prints what it prints;
`--quick` makes them small. Writes one file of JSON with their ratios
(`record`). `--against` compares them with those of an earlier run, and the exit
code is 1 if one grew by more than the threshold, or if a benchmark failed. A
noisy machine needs a larger threshold; another machine has other ratios.
`python -m dr_jax.benchmarks.history FILE...` prints runs as one table.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import NamedTuple

from absl import flags

from dr_jax.benchmarks import record
from dr_jax.benchmarks.record import Ratios
from dr_jax.benchmarks.rows import Rows, tables
from dr_jax.quant.core.checks import one_of
from dr_jax.runtime import command

FLAGS = flags.FLAGS


class Part(NamedTuple):
  """A benchmark, and which numbers of its tables are ratios.

  Attributes:
    name: of its module.
    quick: flags that make it small.
    columns: of its tables that have ratios.
    first: the ratio that a history shows.
    labels: the columns that name a row.
    inverse: whether more is better: 1 / ratio is kept.
  """

  name: str
  quick: tuple[str, ...]
  columns: tuple[str, ...]
  first: str
  labels: tuple[str, ...]
  inverse: bool = False


PARTS = (
  Part(
    "joint_step",
    ("--depth=8", "--batch=32", "--bits=8,2", "--rounds=9", "--novmap"),
    ("of float",),
    "joint alternate sequential, of float",
    ("step",),
  ),
  Part(
    "quantizers",
    ("--weight=3x3x256x256", "--activation=64x32x32x16", "--rounds=11"),
    ("forward of copy", "backward of copy", "both of copies"),
    "double_rounding, both of copies",
    ("quantizer",),
  ),
  Part(
    "hessian",
    ("--depth=8", "--batch=32", "--rounds=9"),
    ("of gradient",),
    "forward over reverse, of gradient",
    ("program",),
  ),
  Part(
    "inference",
    ("--model=resnet8", "--batches=1", "--bits=8,2", "--rounds=51"),
    ("of float32",),
    "carrier, bits 8, of float32",
    ("program", "bits"),
  ),
  Part(
    "planes",
    ("--shapes=1024x2752", "--rounds=50"),
    ("of float32",),
    "4 bits, xla, of float32",
    ("weights",),
  ),
  Part(
    "switch",
    ("--model=resnet18", "--rounds=5"),
    ("ratio",),
    "in memory, ratio",
    ("switch",),
  ),
  Part(
    "data",
    ("--workers=0", "--seconds=3"),
    ("of one core",),
    "workers 0, of one core",
    ("workers",),
    inverse=True,
  ),
)


def define_flags() -> None:
  """Defines what the command takes; some names are also those of others."""
  flags.DEFINE_bool("quick", False, "Make the benchmarks small.")
  flags.DEFINE_list(
    "benchmarks", [part.name for part in PARTS], "Which to run."
  )
  flags.DEFINE_string(
    "output", None, "File of the ratios; by default named by date and commit."
  )
  flags.DEFINE_string("against", None, "File of an earlier run to compare.")
  flags.DEFINE_float(
    "threshold", 1.5, "How many times an earlier ratio is allowed.", 1.0
  )


def main() -> int:
  """Runs, writes and compares; returns the exit code."""
  names = [part.name for part in PARTS]
  for name in FLAGS.benchmarks:
    one_of("benchmarks", name, names)
  earlier = None
  if FLAGS.against is not None:
    earlier = record.read(pathlib.Path(FLAGS.against))
    if earlier.quick != FLAGS.quick:
      raise ValueError(
        f"against must be of a run with --quick={FLAGS.quick}, as this one, "
        f"got {FLAGS.against}"
      )
  found: Ratios = {}
  failed = 0
  for part in PARTS:
    if part.name in FLAGS.benchmarks:
      try:
        found[part.name] = ratios(part, _run(part, FLAGS.quick))
      except ValueError as error:
        command.report(error)
        failed += 1
  made = record.now(FLAGS.quick, found)
  path = pathlib.Path(
    FLAGS.output or f"benchmarks-{made.date}-{made.commit}.json"
  )
  made.write(path)
  print(f"ratios: {path}")
  grown = compare(earlier, made, FLAGS.threshold) if earlier else 0
  return int(bool(failed or grown))


def ratios(part: Part, text: str) -> dict[str, float]:
  """Returns {row and column: ratio} of what a benchmark printed.

  Raises:
    ValueError: if no table has the columns.
  """
  found = {}
  for table in tables(text):
    for row in table:
      for column in part.columns:
        if row.get(column):
          ratio = float(row[column])
          found[_name(part, row, column)] = 1 / ratio if part.inverse else ratio
  if not found:
    raise ValueError(f"{part.name} must print {', '.join(part.columns)}")
  return found


def compare(
  earlier: record.Record, later: record.Record, threshold: float
) -> int:
  """Prints earlier and later ratios; returns how many grew too much."""
  rows = Rows(
    f"{earlier.commit} ({earlier.date}, {earlier.machine}) and "
    f"{later.commit} ({later.date}, {later.machine})",
    ("benchmark", "ratio", "earlier", "later", "growth", ""),
    left=2,
  )
  grown = 0
  for part, later_ratios in later.ratios.items():
    before = earlier.ratios.get(part, {})
    for name in dict.fromkeys([*before, *later_ratios]):
      old, new = before.get(name), later_ratios.get(name)
      growth = new / old if old and new is not None else None
      too_much = growth is not None and growth > threshold
      grown += too_much
      rows.add(
        part,
        name,
        *("" if n is None else f"{n:.2f}" for n in (old, new, growth)),
        "grew" if too_much else "",
      )
  rows.end()
  print(f"{grown} grew by more than {threshold:g} times")
  return grown


def _name(part, row, column):
  """Names of numbers go with them: "carrier, bits 8, of float32"."""
  cells = [(name, row[name]) for name in part.labels if row.get(name)]
  words = [f"{n} {c}" if c.isdecimal() else c for n, c in cells]
  return ", ".join([*words, column])


def _run(part: Part, quick: bool) -> str:
  """Runs a benchmark as a user does; returns what it printed."""
  arguments = part.quick if quick else ()
  line = [sys.executable, "-m", f"dr_jax.benchmarks.{part.name}", *arguments]
  print(f"## {part.name} {' '.join(arguments)}\n", flush=True)
  printed = []
  with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    for text in process.stdout:
      print(text, end="", flush=True)
      printed.append(text)
  if process.returncode:
    raise ValueError(f"{part.name} ended with exit code {process.returncode}")
  return "".join(printed)


if __name__ == "__main__":
  define_flags()
  sys.exit(command.start(main))
