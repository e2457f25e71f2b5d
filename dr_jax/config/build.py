"""From a nested dict to a checked `Config`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from dr_jax.config.checks import check, one_of
from dr_jax.config.fields import Config, ConfigError, shown
from dr_jax.quant import RECIPES
from dr_jax.search import SEARCHES


def from_dict(values: Mapping[str, Any]) -> Config:
  """Builds a checked configuration.

  Fields that are missing or None take the value of the method's recipe, or
  else their default.

  Raises:
    ConfigError: for an unknown field, a wrong type, or a value that a field
      does not allow, naming the field, the value and what it must be.
  """
  config = _with_searches(_with_recipe(_build(Config, values, ""), values))
  check(config)
  return config


def _with_searches(config):
  """Strategies that are left open are all there are."""
  if config.search.strategies or "search" not in config.stages:
    return config
  every = dataclasses.replace(config.search, strategies=tuple(SEARCHES))
  return dataclasses.replace(config, search=every)


def _with_recipe(config, values):
  """Fills fields of `quant` and `train` that were left to the method."""
  one_of("method", config.method, RECIPES)
  recipe = RECIPES[config.method]
  own = {k: v for k, v in recipe._asdict().items() if v is not None}
  given_bits = (values.get("quant") or {}).get("bits")
  bits = config.quant.bits if given_bits else own.get("bits", config.quant.bits)
  left = own | {"loss_weights": recipe.loss_weights(bits)}
  filled = {}
  for group in ("quant", "train"):
    given = values.get(group) or {}
    part = getattr(config, group)
    missing = {
      field.name: left[field.name]
      for field in dataclasses.fields(part)
      if field.name in left and given.get(field.name) is None
    }
    filled[group] = dataclasses.replace(part, **missing)
  options = {
    f"{role}_options": _options(role, values.get("quant") or {}, left)
    for role in ("weight", "activation")
  }
  filled["quant"] = dataclasses.replace(filled["quant"], **options)
  return dataclasses.replace(config, **filled)


def _options(role, given, left):
  """Options that are set, and the recipe's where the quantizer is its own."""
  options = given.get(f"{role}_options") or {}
  set_by_hand = {k: v for k, v in options.items() if v is not None}
  if given.get(role) in (None, left[role]):
    return {**left[f"{role}_options"], **set_by_hand}
  return set_by_hand


def _build(kind, values, prefix):
  if not isinstance(values, Mapping):
    raise ConfigError(
      f"{prefix[:-1] or 'configuration'} must be a group of fields, got "
      f"{shown(values)}"
    )
  types = typing.get_type_hints(kind)
  filled = {}
  for name, value in values.items():
    if name not in types:
      raise ConfigError(
        f"{prefix}{name} is not a field; it must be one of {', '.join(types)}"
      )
    if value is None:
      continue
    if dataclasses.is_dataclass(types[name]):
      filled[name] = _build(types[name], value, f"{prefix}{name}.")
    else:
      filled[name] = _typed(f"{prefix}{name}", value, types[name])
  return kind(**filled)


def _typed(name, value, kind):
  # One that no float can hold is too large for any field.
  if kind is float and type(value) is int and abs(value) < 2**1023:
    value = float(value)
  if kind is tuple and isinstance(value, list):
    value = tuple(value)
  if kind is dict and isinstance(value, Mapping):
    value = dict(value)
  if type(value) is not kind:
    raise ConfigError(
      f"{name} must be of type {kind.__name__}, got {shown(value)} of type "
      f"{type(value).__name__}"
    )
  return value
