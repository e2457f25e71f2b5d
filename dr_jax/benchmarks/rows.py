"""What a benchmark prints while it measures: rows of a table in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from dr_jax.runtime import command

_T = TypeVar("_T")


class Rows:
  """A table on standard output that shows each row as soon as it is added.

  >>> rows = Rows("two kernels", ("kernel", "ms"))
  two kernels
  <BLANKLINE>
  | kernel | ms |
  | --- | ---: |
  >>> rows.add("1 x 1", "0.5")
  | 1 x 1 | 0.5 |
  >>> rows.end()
  <BLANKLINE>
  """

  def __init__(self, title: str, columns: Sequence[str], *, left: int = 1):
    """Prints title and header.

    Args:
      title: one line or several.
      columns: their headers.
      left: how many columns, from the first on, hold words.
    """
    self._count = len(columns)
    print(f"{title}\n")
    self.add(*columns)
    self.add(*["---"] * left, *["---:"] * (self._count - left))

  def add(self, *cells: str) -> None:
    """Prints a row; cells that are not given are empty."""
    filled = [*cells, *[""] * (self._count - len(cells))]
    print(f"| {' | '.join(filled)} |", flush=True)

  def end(self) -> None:
    """Ends the table with an empty line."""
    print(flush=True)


def tables(text: str) -> list[list[dict[str, str]]]:
  """Returns the tables that `Rows` printed: {column: cell} of each row.

  >>> tables("| kernel | ms |\\n| --- | ---: |\\n| 1 x 1 | 0.5 |")
  [[{'kernel': '1 x 1', 'ms': '0.5'}]]
  """
  found, header = [], None
  for line in text.splitlines():
    if not line.startswith("| "):
      header = None
      continue
    cells = [cell.strip() for cell in line[1:-1].split(" | ")]
    if header is None:
      header = cells
      found.append([])
    elif not all(cell.strip("-:") == "" for cell in cells):
      found[-1].append(dict(zip(header, cells, strict=True)))
  return found


def turns(count: int, of: str = "round") -> Iterable[int]:
  """Yields 0 to `count` - 1, and says on standard error how far it is.

  Where programs take turns, medians are known after the last round only.
  """
  for number in range(count):
    yield number
    note(f"{of} {number + 1}/{count}")


def prepared(name: str, make: Callable[[], _T]) -> _T:
  """Returns what `make` makes, and says on standard error that it did.

  For what compiles, which can take minutes.
  """
  made = make()
  note(f"{name}: ready")
  return made


def note(line: str) -> None:
  """Prints a line on standard error, at once."""
  command.say(line)
