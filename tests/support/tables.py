"""What a table that a benchmark prints says."""

import contextlib
import io


def printed(show, *arguments):
  """What a function that is called with these arguments prints."""
  with contextlib.redirect_stdout(io.StringIO()) as file:
    show(*arguments)
  return file.getvalue()


def cells(text, name):
  """The cells of the row of that name."""
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in text.splitlines()
    if line.startswith("|")
  ]
  (found,) = [row[1:] for row in rows if row[0] == name]
  return found
