"""Quantizers of single layers: rules of a name pattern and what it changes."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dr_jax.quant import ActivationQuantizer, WeightQuantizer

Rule = tuple[str, Mapping[str, Any]]


class Quantizers(NamedTuple):
  """What quantizes one layer; the activation None for float inputs."""

  weight: WeightQuantizer
  activation: ActivationQuantizer | None


def resolve(
  rules: Iterable[Rule], default: Quantizers, names: Sequence[str]
) -> dict[str, Quantizers]:
  """Returns the quantizers of every layer; later rules win.

  Args:
    rules: (pattern, {"weight": ..., "activation": ...}), either or both.
    default: for layers that no rule matches.
    names: of all layers.

  Raises:
    ValueError: if a rule is none, matches no layer, or has other bits.
  """
  found = dict.fromkeys(names, default)
  for rule in rules:
    pattern, changes = _checked(rule, default.weight.bits)
    matched = fnmatch.filter(names, pattern)
    if not matched:
      raise ValueError(
        f"rules must match layers of {list(names)}, but {pattern!r} matches "
        "none"
      )
    for name in matched:
      found[name] = found[name]._replace(**changes)
  return found


def _checked(rule, bits):
  if not _is_rule(rule):
    raise ValueError(
      "rules must be pairs (pattern, {'weight': ..., 'activation': ...}), got "
      f"{rule!r}"
    )
  pattern, changes = rule
  for key, quantizer in changes.items():
    if key == "activation" and quantizer is None:
      continue
    kind = WeightQuantizer if key == "weight" else ActivationQuantizer
    if not isinstance(quantizer, kind):
      raise ValueError(
        f"{key} of rule {pattern!r} must be a quant.{kind.__name__}, got "
        f"{quantizer!r}"
      )
    if quantizer.bits != bits:
      raise ValueError(
        f"{key}.bits of rule {pattern!r} must be those of all layers, {bits}, "
        f"got {quantizer.bits}"
      )
  return pattern, changes


def _is_rule(rule):
  return (
    isinstance(rule, tuple | list)
    and len(rule) == 2
    and isinstance(rule[0], str)
    and isinstance(rule[1], Mapping)
    and set(rule[1]) <= set(Quantizers._fields)
  )
