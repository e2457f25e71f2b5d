"""What JSON that is read back must look like.

A schema is built of Python values:

  int, float, str, bool     exactly that type; a float may be an int, is finite
  None                      null
  object                    anything
  (a, b)                    either
  [a]                       a list of a
  {"x": a, "y": b}          an object with exactly these keys
  {"x": a, ...: b}          an object with these keys and any others
  Where(a, test, words)     a, for which the test holds
"""

from __future__ import annotations

import collections
import json
import math
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 4, 2
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 24

# Deeper than whatever the library writes, and far from Python's own limit.
_DEPTH = 32


class Where(NamedTuple):
  """A schema with a condition, in words for the message."""

  schema: Any
  holds: Callable[[Any], bool]
  words: str


NAME = Where(str, bool, "a string that is not empty")
COUNT = Where(
  int,
  lambda n: type(n) is int and 0 <= n < 2**63,
  "an integer >= 0 and < 2^63",
)


# Also NaN and infinities, as scores can be; an integer that a float can hold.
NUMBER = Where(
  object,
  lambda x: type(x) is float or (type(x) is int and abs(x) < 2**63),
  "a number",
)


def parse(text: bytes | str) -> Any:
  """Parses JSON that nobody vouches for.

  Raises:
    ValueError: if it is not JSON, an object has a key twice, text in it cannot
      be written again, or it is nested more than 32 deep.

  >>> parse('{"bits": [8, 4]}')
  {'bits': [8, 4]}
  """
  try:
    value = json.loads(text, object_pairs_hook=_object)
  except RecursionError:
    raise ValueError("it is nested too deep") from None
  if _too_deep(value, _DEPTH):
    raise ValueError("it is nested too deep")
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError:
    raise ValueError("it has half of a surrogate pair") from None
  return value


def check(value: Any, schema: Any, name: str = "") -> None:
  """Checks a value against a schema.

  Args:
    value: what JSON parsing returned.
    schema: see above.
    name: of the value, for the message.

  Raises:
    ValueError: naming the first entry that does not match, what it must be, and
      its value.

  >>> check({"bits": [8, "4"]}, {"bits": [int]})
  Traceback (most recent call last):
  ...
  ValueError: bits[1] must be an integer, got '4'
  """
  if not _matches_shallowly(value, schema):
    raise ValueError(
      f"{name or 'it'} must be {describe(schema)}, got {shown(value)}"
    )
  if isinstance(schema, Where):
    check(value, schema.schema, name)
  elif isinstance(schema, tuple):
    chosen = next(s for s in schema if _matches_shallowly(value, s))
    check(value, chosen, name)
  elif isinstance(schema, list):
    for number, entry in enumerate(value):
      check(entry, schema[0], f"{name}[{number}]")
  elif isinstance(schema, dict):
    for key, entry in value.items():
      inner = schema[key] if key in schema else schema[...]
      check(entry, inner, f"{name}.{key}" if name else key)


def describe(schema: Any) -> str:
  """Says in words what a schema demands, not looking inside.

  >>> describe((None, {"name": str}))
  'null or an object with name'
  """
  if isinstance(schema, Where):
    return schema.words
  if isinstance(schema, tuple):
    return " or ".join(map(describe, schema))
  if isinstance(schema, list):
    return "a list"
  if isinstance(schema, dict):
    keys = [key for key in schema if key is not ...]
    return f"an object with {', '.join(keys)}" if keys else "an object"
  words = {int: "an integer", float: "a finite number", str: "a string"}
  return words.get(schema, "null" if schema is None else "true or false")


def shown(value: Any) -> str:
  """Shows a value from a file in at most a hundred characters.

  >>> shown({"a": 1, "b": [2] * 100})
  "an object with ['a', 'b']"
  """
  if isinstance(value, dict):
    return f"an object with {_SHORT.repr(list(value))}"
  return _SHORT.repr(value)


def _matches_shallowly(value, schema):
  if isinstance(schema, Where):
    return _matches_shallowly(value, schema.schema) and schema.holds(value)
  if isinstance(schema, tuple):
    return any(_matches_shallowly(value, s) for s in schema)
  if isinstance(schema, list):
    return isinstance(value, list)
  if isinstance(schema, dict):
    if not isinstance(value, dict):
      return False
    known = {key for key in schema if key is not ...}
    return known == {*value} or (... in schema and known <= {*value})
  if schema is object:
    return True
  if schema is float:
    return _is_finite_number(value)
  return value is None if schema is None else type(value) is schema


def _is_finite_number(value):
  if type(value) is int:
    return abs(value) < 2**1023
  return type(value) is float and math.isfinite(value)


def _object(pairs):
  value = dict(pairs)
  if len(value) < len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    raise ValueError(f"it has {shown(counts.most_common(1)[0][0])} twice")
  return value


def _too_deep(value, left):
  if not isinstance(value, list | dict):
    return False
  inner = value.values() if isinstance(value, dict) else value
  return left == 0 or any(_too_deep(entry, left - 1) for entry in inner)
