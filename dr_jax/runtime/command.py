"""What commands have in common: one-line errors, Ctrl-C, standard output.

Loads nothing that takes time, so that a command can heed Ctrl-C before its
other imports.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

# What a flag must be, where Python or absl says why its value is not that.
_ALLOWED = {
  "invalid literal for int()": "an integer",
  "could not convert string to float": "a number",
  "('Non-boolean argument to boolean flag'": "true or false",
}


def stop_on_interrupt(advice: str) -> None:
  """Lets Ctrl-C end this process at once, unless it is ignored.

  Args:
    advice: what to do then, in a few words.
  """
  if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(
      signal.SIGINT, lambda number, frame: stop_at_once(number, advice)
    )


def stop_at_once(number: int, advice: str) -> None:
  """Ends the process on a signal, wherever it is, without a traceback.

  A KeyboardInterrupt would be swallowed by some code, and others would report
  it, or abort. Files that are being written appear whole or not at all.
  """
  line = f"stopped at once; {advice}\n"
  if os.isatty(2):  # A bar of progress hides the cursor.
    line = f"\x1b[?25h\r{line}"
  with contextlib.suppress(OSError):
    os.write(2, line.encode())
  os._exit(128 + number)


def run(function: Callable[[], Any]) -> None:
  """Runs a command with standard streams that can fail without a traceback.

  Args:
    function: ends with SystemExit, as `absl.app.run` does.
  """
  _open_standard_streams()
  try:
    function()
  except BrokenPipeError:  # Of the text of --help.
    sys.exit(128 + signal.SIGPIPE)
  finally:
    try:
      if sys.stdout is not None:
        sys.stdout.flush()
    except OSError:
      _drop_output()


def start(main: Callable[..., int | None], *arguments: str) -> None:
  """Runs a command, and ends the process with its exit code.

  Bad input and files that cannot be read or written are one line, and code 2.

  Args:
    main: does what the flags say; returns the exit code, or None for 0. It
      is called with the arguments of the command line that are no flags.
    *arguments: their names, as `check_arguments` takes them; by default there
      are none.
  """
  from absl import app  # Ctrl-C is heeded before it is loaded.

  run(lambda: app.run(reporting(main, *arguments), flags_parser=parse_flags))


def reporting(
  main: Callable[..., int | None], *arguments: str
) -> Callable[[list[str]], None]:
  """Returns what `start` runs with the command line, without its flags."""
  from dr_jax.runtime import processes

  def run_main(argv):
    warnings.showwarning = warn
    try:
      check_arguments(argv, *arguments)
      code = main(*argv[1:])
    except Exception as error:
      if processes.exit_code(error) != 2:
        raise
      report(error)
      code = 2
    sys.exit(code)

  return run_main


def required(*flags: Any) -> list[Any]:
  """Returns the values of flags; raises ValueError for none or an empty one."""
  for flag in flags:
    if flag.value is None:
      raise ValueError(f"--{flag.name} must be set; see --help")
    if flag.value == "":
      raise ValueError(f"--{flag.name} must not be empty, got ''")
  return [flag.value for flag in flags]


def parse_flags(argv: list[str]) -> list[str]:
  """Parses absl's flags; anything wrong is one line and exit code 2.

  Returns:
    The command, and the arguments that are no flags.
  """
  from absl import flags  # Ctrl-C is heeded before it is loaded.

  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    report(flag_error(error))
    sys.exit(2)
  except SystemExit:  # After --help, which absl ends as an error.
    sys.exit(0)


def flag_error(error: Exception) -> str:
  """Returns an error of absl about flags, with what is allowed.

  >>> flag_error(ValueError("flag --a=x: could not convert string to float"))
  'flag --a=x must be a number'
  """
  text = one_line(error)
  for reason, allowed in _ALLOWED.items():
    start, found, _ = text.partition(f": {reason}")
    if found:
      return f"{start} must be {allowed}"
  return text


def without_help(argv: list[str]) -> tuple[list[str], bool]:
  """Returns a command line without --help, and whether it was there."""
  end = argv.index("--") if "--" in argv else len(argv)
  kept = [a for a in argv[:end] if a not in ("--help", "-help", "-?")]
  return kept + argv[end:], len(kept) < end


def check_arguments(argv: list[str], *names: str) -> None:
  """Raises ValueError unless a command line has these besides its flags.

  Args:
    argv: the command, and its arguments that are no flags.
    *names: of the arguments; a last one that ends with "..." is one or more.
  """
  given = argv[1:]
  wanted = " and ".join([*names, "flags, --name=value"])
  if missing := names[len(given) :]:
    raise ValueError(f"arguments must be {wanted}, got no {missing[0]}")
  repeats = names[-1:] and names[-1].endswith("...")
  if (extra := given[len(names) :]) and not repeats:
    raise ValueError(f"arguments must be {wanted}, got {extra[0]!r}")


def report(error: Any) -> None:
  """Prints an error in one line, if anyone can read it."""
  say(f"error: {one_line(error)}")


def warn(
  message: Any,
  category: Any,
  filename: str,
  lineno: int,
  file: Any = None,
  line: str | None = None,
) -> None:
  """Prints a warning in one line, in place of `warnings.showwarning`."""
  say(f"warning: {one_line(message)}")


def say(line: str) -> None:
  """Prints a line on standard error, if anyone can read it."""
  with contextlib.suppress(OSError, ValueError):
    print(line, file=sys.stderr, flush=True)


def one_line(message: Any) -> str:
  """A message without line breaks; the type of an error that says nothing.

  Of an error of the system, the file and the reason alone.

  >>> one_line(ValueError("a\\n  b")), one_line(ValueError())
  ('a b', 'ValueError')
  >>> one_line(OSError(errno.EISDIR, "Is a directory", "runs"))
  'runs: Is a directory'
  >>> one_line(OSError(errno.EISDIR, "Is a directory", "new", None, "runs"))
  'runs: Is a directory'
  """
  text = str(message)
  if isinstance(message, OSError) and isinstance(message.filename, str):
    # A file that is renamed has a name that nobody knows of.
    name = message.filename2 or message.filename
    text = f"{name}: {message.strerror}"
  return " ".join(text.split()) or type(message).__name__


def first_line(error: BaseException) -> str:
  """The first line of an error; the type of one that says nothing.

  >>> first_line(ValueError("a\\nb")), first_line(ValueError())
  ('a', 'ValueError')
  """
  return (str(error) or type(error).__name__).splitlines()[0]


def show(write: Callable[[], None], result: Any = None) -> int:
  """Writes to standard output what a command found; returns the exit code.

  Args:
    write: prints it.
    result: where it is to be found, whether it is printed or not, if anywhere.
  """
  if sys.stdout is None:  # Its descriptor was closed.
    return 0
  # An encoding without a sign that a table has is no reason to fail.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")
  try:
    write()
    sys.stdout.flush()
  except OSError as error:
    _drop_output()
    if error.errno == errno.EPIPE:
      return 128 + signal.SIGPIPE
    elsewhere = "" if result is None else f"; see {result}"
    report(f"standard output: {error.strerror}{elsewhere}")
    return 2
  return 0


def _drop_output():
  """Sends what is left of standard output, and its buffer, nowhere."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_streams():
  """Opens closed ones, so that no file gets their number and the output."""
  for descriptor in (0, 1, 2):
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)
