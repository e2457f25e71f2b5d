"""The flag --config: a configuration file, and flags that set its fields.

Whatever is wrong with a file or with a flag is one `ConfigError` of one line.
"""

from __future__ import annotations

import os
import pathlib
import sys
import traceback
import types
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import RequiredValueError
from ml_collections.config_flags import tuple_parser

from dr_jax.config.fields import ConfigError
from dr_jax.runtime import command

# The flags are the caller's: --help lists those of the command.
flags.disclaim_key_flags()


def define(name: str, help: str) -> flags.FlagHolder:
  """Defines a flag for a configuration file, and flags for its fields.

  As `config_flags.DEFINE_config_file`, but a file that cannot be loaded is an
  error at once, and a tuple that is given twice is replaced, not extended.
  """
  config_flags.register_flag_parser_for_type(tuple, _TupleParser())
  holder = config_flags.DEFINE_config_file(name, help_string=help)
  flags.FLAGS[name].parser = _FileParser()
  return holder


def parse(argv: list[str], name: str = "config") -> list[str]:
  """Parses the flags of a command.

  Args:
    argv: the command and its arguments.
    name: of the flag that `define` made.

  Returns:
    The arguments that are no flags.

  Raises:
    ConfigError: for anything that cannot be parsed or loaded.
  """
  try:
    return flags.FLAGS(argv)
  except BrokenPipeError:  # Whoever read --help has seen enough.
    raise
  # Parsing sees nothing but what the user wrote: any error is about that.
  except Exception as error:
    if isinstance(error.__context__, ConfigError):
      raise error.__context__ from None
    parser: Any = flags.FLAGS[name].parser
    unknown = _unknown_field(argv, name, parser.loaded)
    raise ConfigError(unknown or _words(error)) from None


def load(argument: str) -> ConfigDict:
  """Runs a configuration file.

  Args:
    argument: "FILE.py", or "FILE.py:ARG" to call its get_config with ARG.

  Returns:
    What its function get_config returns.

  Raises:
    ConfigError: with the file and, where there is one, the line: if the file
      cannot be read or run, has no get_config, or that raises or returns
      anything but a ConfigDict.
  """
  path, *arguments = argument.split(":", 1)
  # A pipe would wait for its other end.
  if not os.path.isfile(path):
    raise ConfigError(f"--config={argument}: {path!r} is not a file")
  module = types.ModuleType("config_file")
  module.__file__ = path
  # Where dataclasses look for the names in their annotations.
  sys.modules[module.__name__] = module
  line = None
  try:
    code = compile(pathlib.Path(path).read_bytes(), path, "exec")
    exec(code, vars(module))
    function: Any = getattr(module, "get_config", None)
    if not callable(function):
      raise ConfigError(f"{path} must define a function get_config")
    # Of a call with the wrong number of arguments, which no line makes.
    line = getattr(getattr(function, "__code__", None), "co_firstlineno", None)
    config = function(*arguments)
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:
    place = _place(error, path, line)
    raise ConfigError(f"{place}: {_words(error)}") from None
  if not isinstance(config, ConfigDict):
    raise ConfigError(
      f"{path}, line {line}: get_config must return a ConfigDict, got "
      f"{type(config).__name__}"
    )
  return config


def values(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
  """Returns a configuration as nested dicts.

  Raises:
    ConfigError: for a required placeholder that has no value.
  """
  found = {}
  for name in config:
    try:
      value = config[name]
    except RequiredValueError:
      raise ConfigError(f"{prefix}{name} must be set, got None") from None
    if isinstance(value, ConfigDict):
      value = values(value, f"{prefix}{name}.")
    found[name] = value
  return found


class _FileParser(flags.ArgumentParser):
  """Loads a file; `loaded` is the last one's configuration, or None."""

  def __init__(self):
    self.loaded: ConfigDict | None = None

  def parse(self, argument):
    self.loaded = config = load(argument)
    return config.lock()

  def flag_type(self):
    return "config object"


class _TupleParser(flags.ArgumentParser):
  """ml_collections' parser; flags of any other type do not add up."""

  def parse(self, argument):
    return tuple_parser.TupleParser().parse(argument)

  def flag_type(self):
    return "tuple"


def _place(error, path, line):
  """The file and line of an error: the last line of the file that ran."""
  if isinstance(error, SyntaxError) and error.filename:
    path, line = error.filename, error.lineno
  else:
    for frame, number in traceback.walk_tb(error.__traceback__):
      if frame.f_code.co_filename == path:
        line = number
  return f"{path}, line {line}" if line else path


def _words(error):
  """An error in a few words, with its type unless it is one of absl's."""
  text = error.msg if isinstance(error, SyntaxError) else str(error)
  text = " ".join(text.split())
  if isinstance(error, flags.Error):
    return command.flag_error(error)
  return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _unknown_field(argv, name, config):
  """Describes the first --config.x.y that the file does not have, if any."""
  for override in argv:
    flag = override.partition("=")[0].lstrip("-").removeprefix("no")
    if not flag.startswith(f"{name}.") or config is None:
      continue
    node, path = config, flag.split(".")[1:]
    for depth, key in enumerate(path):
      if not isinstance(node, ConfigDict):
        group = ".".join(path[:depth])
        return f"{override}: {group} is a value, not a group of fields"
      if key not in node:
        return (
          f"{override}: field must be one of {', '.join(node)}, got {key!r}"
        )
      node = node[key]
  return None
