"""Writes the page of a run or a comparison again, or compares several runs.

python -m dr_jax.report WORKDIR... [--output=FILE.html]

A page is made of the files in the directories alone: no network, no data. One
directory gets its own page, in its report/index.html, with figures as PNG and
SVG beside it; several runs get a page that compares them, in runs.html here.
--output names another file for the page.

Exit codes:
    0: written
    1: an error that nobody expected, with its traceback
    2: bad input, or files that cannot be read or written
  130: stopped by Ctrl-C; nothing was written
"""

from __future__ import annotations

from dr_jax.runtime import command

# The imports below take seconds.
if __name__ == "__main__":
  command.stop_on_interrupt("nothing was written")

from absl import flags

from dr_jax import report
from dr_jax.runtime import files

_OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "The page to write; by default report/index.html in the directory, or "
  "runs.html here for several directories.",
)


def start() -> None:
  """Runs the command with the arguments of this process, and ends it."""
  command.start(write_page, "WORKDIR...")


def write_page(*directories: str) -> int:
  """Writes the page of these directories; returns the exit code."""
  several = len(directories) > 1
  output = _OUTPUT.value or ("runs.html" if several else None)
  try:
    if output is None:
      report.write_page(directories[0])
      output = files.expand(directories[0]) / report.PAGE
    elif several:
      runs = {d: report.read_run(d) for d in directories}
      files.write_text(output, report.runs_page(runs))
    else:
      files.write_text(output, report.page_of(directories[0]))
  except ImportError as error:
    raise ValueError(error) from None
  return command.show(lambda: print(output), output)


if __name__ == "__main__":
  start()
