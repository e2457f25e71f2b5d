"""Constraints of a field: said once, in its metadata, checked and shown.

Names are looked up when they are needed ("dr_jax.models:NAMES"), so that fields
load nothing of the library. `checks` checks constraints, `help` shows them.
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
from collections.abc import Collection, Sequence
from typing import Any

# How a bound is written, and when it holds; NaN keeps none of them.
BOUNDS = {
  "at_least": (">= {}", operator.ge),
  "above": ("> {}", operator.gt),
  "at_most": ("<= {}", operator.le),
  "below": ("< {}", operator.lt),
}


def field(
  default: Any,
  *,
  one_of: str | Sequence[Any] | None = None,
  at_least: float | None = None,
  above: float | None = None,
  at_most: float | None = None,
  below: float | None = None,
  each: type | tuple[type, ...] | None = None,
  pattern: tuple[str, str] | None = None,
  nonempty: bool | None = None,
  distinct: bool | None = None,
  only_with: tuple[str, tuple[str, ...]] | None = None,
) -> Any:
  """A field with constraints on its value, or on the entries of a tuple.

  Args:
    default: its default.
    one_of: values, among them "module:NAME" for all of that collection, or of
      the one that this function returns.
    at_least, above, at_most, below: bounds, which NaN does not keep.
    each: type of the entries of a tuple.
    pattern: regular expression of a string, and what it means in words.
    nonempty: whether a string or tuple must have an entry.
    distinct: whether the entries of a tuple must differ.
    only_with: another field of the group, and its values with which this one
      has an effect; with others it must keep its default.
  """
  constraints = {
    "one_of": one_of,
    "at_least": at_least,
    "above": above,
    "at_most": at_most,
    "below": below,
    "each": each,
    "pattern": pattern,
    "nonempty": nonempty,
    "distinct": distinct,
    "only_with": only_with,
  }
  return dataclasses.field(
    default=default,
    metadata={k: v for k, v in constraints.items() if v is not None},
  )


def mapping() -> Any:
  """A field that is a dict, empty by default."""
  return dataclasses.field(default_factory=dict)


def allowed_values(names: str | Sequence[Any]) -> Collection[Any]:
  """The values of a constraint `one_of`, with those of collections it names.

  >>> allowed_values(("none", "dr_jax.train:SCHEDULES"))
  ['none', 'alternate', 'accumulate']
  """
  found: list[Any] = []
  for name in (names,) if isinstance(names, str) else names:
    if isinstance(name, str) and ":" in name:
      module, _, attribute = name.partition(":")
      values = getattr(importlib.import_module(module), attribute)
      found += values() if callable(values) else values
    else:
      found.append(name)
  return found
