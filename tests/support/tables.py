"""What a printed table of rich says."""

import io

from rich.console import Console


def printed(table):
  file = io.StringIO()
  Console(file=file, width=200).print(table)
  return file.getvalue()


def cells(text, name):
  """The cells of the row of that name."""
  rows = [
    [cell.strip() for cell in line.strip("│").split("│")]
    for line in text.splitlines()
    if "│" in line
  ]
  (found,) = [row[1:] for row in rows if row[0] == name]
  return found
