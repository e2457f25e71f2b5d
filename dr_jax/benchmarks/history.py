"""Runs of the benchmarks as one table.

  python -m dr_jax.benchmarks.history FILE...

FILE is what `python -m dr_jax.benchmarks.all` wrote. A row is a run, from the
earliest on, with the first ratio of each benchmark.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from dr_jax.benchmarks import record
from dr_jax.benchmarks.all import PARTS
from dr_jax.benchmarks.rows import Rows
from dr_jax.runtime import command


def main(*files: str) -> None:
  """Prints the table."""
  print_table([record.read(pathlib.Path(file)) for file in files])


def print_table(records: Sequence[record.Record]) -> None:
  """A row for each record, by date."""
  rows = Rows(
    "\n".join(f"{part.name}: {part.first}" for part in PARTS),
    ("date", "commit", "machine", "jax", *(part.name for part in PARTS)),
    left=4,
  )
  for found in sorted(records, key=lambda found: found.date):
    cells = [found.ratios.get(part.name, {}).get(part.first) for part in PARTS]
    rows.add(
      found.date,
      found.commit,
      found.machine + " (quick)" * found.quick,
      found.environment.get("jax", ""),
      *("" if cell is None else f"{cell:.2f}" for cell in cells),
    )
  rows.end()


if __name__ == "__main__":
  command.start(main, "FILE...")
