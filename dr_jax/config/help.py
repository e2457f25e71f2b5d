"""What fields of a configuration mean and allow, for `--help`.

Meanings come from the "Attributes" of the groups' docstrings, ranges from the
constraints that are checked.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import re
import shlex
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dr_jax.config.constraints import BOUNDS, allowed_values
from dr_jax.config.fields import Config

_WORDS = {
  bool: "True or False",
  int: "an integer",
  float: "a number",
  str: "a string",
  tuple: "a tuple",
  dict: "a group of named values",
}


_ABSENT = object()


class FieldHelp(NamedTuple):
  """One field, or one group of fields.

  Attributes:
    name: with its groups, as train.epochs.
    meaning: in words.
    allowed: its type and constraints in words; "" for a group.
    default: its value where nothing sets it; None for a group.
  """

  name: str
  meaning: str
  allowed: str
  default: Any = None


def field_help(kind: type = Config, prefix: str = "") -> Iterator[FieldHelp]:
  """Yields all fields of a group, and of the groups in it behind their group.

  >>> found = {field.name: field for field in field_help()}
  >>> found["train.warmup"].meaning
  'Fraction of the steps in which the learning rate rises to its peak.'
  >>> found["train.warmup"].allowed
  'a number >= 0 and < 1'
  """
  meanings, types = attributes(kind), typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    name, meaning = f"{prefix}{field.name}", meanings.get(field.name, "")
    if dataclasses.is_dataclass(types[field.name]):
      yield FieldHelp(name, meaning, "")
      yield from field_help(types[field.name], f"{name}.")
      continue
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    allowed = _allowed(types[field.name], field.metadata, prefix)
    yield FieldHelp(name, meaning, allowed, default)


def attributes(kind: type) -> dict[str, str]:
  """Returns what a docstring says under "Attributes", by name."""
  _, _, text = (inspect.getdoc(kind) or "").partition("Attributes:\n")
  found = {}
  for entry in re.split(r"^  (?=\w)", text, flags=re.MULTILINE)[1:]:
    names, _, words = " ".join(entry.split()).partition(": ")
    for name in names.split(", "):
      found[name] = words[:1].upper() + words[1:]
  return found


def describe(
  values: Mapping[str, Any],
  config: Config | None,
  fields: Iterable[FieldHelp],
  *,
  width: int,
) -> str:
  """Returns a paragraph for every field: flag with its value, meaning, range.

  Fields that the file does not have, which no flag can set, come last.

  Args:
    values: what the file says, as nested dicts.
    config: what that makes of each field; None if it is not valid.
    fields: to be described.
    width: of a line, in characters.
  """
  inside, outside = [], []
  for field in fields:
    given = _given(values, field.name)
    if not field.allowed:
      if given is not _ABSENT:
        inside.append(_wrapped(f"{field.name}: {field.meaning}", width))
      continue
    used = field.default if given is _ABSENT else given
    if config is not None:
      used = operator.attrgetter(field.name)(config)
    if given is _ABSENT:
      outside.append(_paragraph([_flag(field.name, used)], field, width))
    else:
      flags = [f"--config.{flag}" for flag in _flags(field.name, given, used)]
      inside.append(_paragraph(flags, field, width))
  if outside:
    missing = "Not in the file, which must have a field for a flag to set it:"
    inside += [_wrapped(missing, width), *outside]
  return "\n\n".join(inside)


def _allowed(kind, rules, prefix):
  """Says what `checks.check_fields` lets a field be."""
  text = _entry(kind, rules)
  if (each := rules.get("each")) is not None:
    # Where an integer is allowed too, the float says so.
    each = each[-1] if isinstance(each, tuple) else each
    text = f"a tuple, each {_entry(each, rules)}"
  if rules.get("nonempty"):
    text += ", not empty"
  if rules.get("distinct"):
    text += ", all different"
  if "only_with" in rules:
    other, values = rules["only_with"]
    text += f"; only with {prefix}{other}={' or '.join(values)}"
  return text


def _entry(kind, rules):
  """What a value, or an entry of a tuple, can be."""
  if "one_of" in rules:
    return f"one of {', '.join(map(str, allowed_values(rules['one_of'])))}"
  if "pattern" in rules:
    return rules["pattern"][1]
  bounds = [
    text.format(rules[key]) for key, (text, _) in BOUNDS.items() if key in rules
  ]
  return " ".join([_WORDS[kind], " and ".join(bounds)]).rstrip()


def _given(values, name):
  """What nested dicts have at a name, or _ABSENT."""
  for key in name.split("."):
    if not isinstance(values, Mapping) or key not in values:
      return _ABSENT
    values = values[key]
  return values


def _flags(name, given, used):
  """The flags of a field: one, or one for each entry of a group of values."""
  if not isinstance(given, Mapping) or not given:
    yield _flag(name, used)
    return
  for key, entry in given.items():
    found = used.get(key, entry) if isinstance(used, Mapping) else entry
    yield from _flags(f"{name}.{key}", entry, found)


def _flag(name, value):
  if value is None:  # It is left to the method.
    return name
  text = value if isinstance(value, str) else repr(value)
  quoted = shlex.quote(text)
  # Of strings in a tuple, this is easier to read.
  if "'" in text and not set('"$`\\!') & set(text):
    quoted = f'"{text}"'
  return f"{name}={quoted}"


def _paragraph(lines, field, width):
  words = f"{field.meaning} Must be {field.allowed}."
  return "\n".join([*lines, _wrapped(words, width, "    ")])


def _wrapped(text, width, indent=""):
  return textwrap.fill(
    text,
    max(width, 20),
    initial_indent=indent,
    subsequent_indent=indent,
    break_on_hyphens=False,
    break_long_words=False,
  )
