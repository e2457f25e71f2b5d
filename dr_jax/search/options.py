"""Options of searches: what each may be is said once, in its annotation.

A strategy annotates its keyword arguments with the types below and checks them
before it looks at anything else; whoever has options alone, as a configuration
has, checks them by `check_options` too.
"""

from __future__ import annotations

import inspect
import operator
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple


class Range(NamedTuple):
  """Numbers from `low` to `high`, both included."""

  low: float
  high: float


Seed = Annotated[int, Range(0, 2**32 - 1)]
Count = Annotated[int, Range(1, 10**6)]
CountOrNone = Annotated[int | None, Range(1, 10**6)]
# Of what is held in memory, or is a layer of a network.
Size = Annotated[int, Range(1, 10**4)]
CountFrom0 = Annotated[int, Range(0, 10**6)]
Fraction = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(1e-12, 1000)]
Factor = Annotated[float, Range(0, 10**6)]
Noise = Annotated[float, Range(0, 10)]
PercentOrNone = Annotated[float | None, Range(0, 100)]
Temperature = Annotated[float, Range(1e-6, 10**6)]


def check_options(
  strategy: Callable[..., Any], options: Mapping[str, Any]
) -> None:
  """Checks options of a strategy by their annotations.

  Args:
    strategy: a function whose keyword arguments are annotated.
    options: by name; others than its keyword arguments are not looked at.

  Raises:
    ValueError: naming the first option that is wrong and what it must be.

  >>> def strategy(*, draws: Count = 1): ...
  >>> check_options(strategy, {"draws": 0})
  Traceback (most recent call last):
  ValueError: draws must be an integer >= 1, got 0
  """
  signature = inspect.signature(strategy, eval_str=True)
  for name, parameter in signature.parameters.items():
    if parameter.kind == parameter.KEYWORD_ONLY and name in options:
      _check(name, options[name], parameter.annotation)


def _check(name, value, annotation):
  kind, *limits = typing.get_args(annotation) or (annotation,)
  if type(None) in typing.get_args(kind):
    if value is None:
      return
    kind, _ = typing.get_args(kind)
  rule = _broken(value, kind, *limits)
  if rule:
    raise ValueError(f"{name} must be {rule}, got {value!r}")


def _broken(value, kind, limits=Range(0, 0)):  # noqa: B008
  """What a value must be and is not, or None."""
  if kind in (bool, str):
    words = {bool: "True or False", str: "a string"}
    return None if isinstance(value, kind) else words[kind]
  low, high = limits
  if kind is int:
    number = _index(value)
    if number is None or number < low:
      return f"an integer >= {low}"
    return f"an integer <= {high}" if number > high else None
  # Written so that NaN is outside.
  inside = _is_real(value) and low <= value <= high
  return None if inside else f"in {low}..{high}"


def _index(value):
  try:
    return None if isinstance(value, bool) else operator.index(value)
  except TypeError:
    return None


def _is_real(value):
  return isinstance(value, int | float) and not isinstance(value, bool)
