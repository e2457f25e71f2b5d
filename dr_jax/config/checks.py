"""Checks of a configuration: every field by its constraints, then in pairs.

How many devices there are, and what is on disk, is not known here: the run
checks that.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Collection, Mapping
from typing import Any

from dr_jax import quant, search, train
from dr_jax.config.fields import (
  Config,
  ConfigError,
  DataConfig,
  QuantConfig,
  TrainConfig,
)


def check(config: Config) -> None:
  """Checks a configuration.

  Raises:
    ConfigError: naming the first field that is wrong, its value and what it
      must be.
  """
  check_fields(config)
  quantizers(config.quant)
  _check_data(config.data)
  _check_devices(config)
  _check_training(config)
  _check_pretrain(config.pretrain)
  _check_curriculum(config)
  _check_mixed(config)


def check_fields(group: Any, prefix: str = "") -> None:
  """Checks every field of a group, and of the groups in it, by its constraints.

  Raises:
    ConfigError: for a value that its field does not allow.
  """
  for field in dataclasses.fields(group):
    value, name = getattr(group, field.name), f"{prefix}{field.name}"
    if dataclasses.is_dataclass(value):
      check_fields(value, f"{name}.")
    elif isinstance(value, tuple):
      for entry in value:
        _check_value(name, entry, field.metadata)
    else:
      _check_value(name, value, field.metadata)


def _check_value(name, value, constraints):
  kinds = constraints.get("each")
  if kinds and (isinstance(value, bool) or not isinstance(value, kinds)):
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    words = " or ".join(kind.__name__ for kind in kinds)
    raise ConfigError(f"{name} must be a tuple of {words}, got {value!r} in it")
  if "one_of" in constraints:
    one_of(name, value, _allowed(constraints["one_of"]))
  bounds = {
    ">= {}": ("at_least", lambda bound: value >= bound),
    "> {}": ("above", lambda bound: value > bound),
    "<= {}": ("at_most", lambda bound: value <= bound),
  }
  for text, (key, holds) in bounds.items():
    # Written so that NaN fails too.
    if key in constraints and not holds(constraints[key]):
      raise ConfigError(
        f"{name} must be {text.format(constraints[key])}, got {value!r}"
      )
  if isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f"{name} must be finite, got {value!r}")


def _allowed(names):
  """The values of a constraint "module:NAME", or those given."""
  if not isinstance(names, str):
    return names
  module, _, attribute = names.partition(":")
  return getattr(importlib.import_module(module), attribute)


def one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
  """Raises ConfigError unless a value is one of those allowed."""
  if value not in allowed:
    known = ", ".join(map(str, allowed))
    raise ConfigError(f"{name} must be one of {known}, got {value!r}")


def quantizers(
  config: QuantConfig,
) -> tuple[quant.WeightQuantizer, quant.ActivationQuantizer | None]:
  """Builds the quantizers of a configuration.

  Raises:
    ConfigError: for a name, a bit-width or an option that is not allowed.
  """
  weight = _quantizer(config, "weight", quant.WeightQuantizer)
  if config.activation == "none":
    return weight, None
  return weight, _quantizer(config, "activation", quant.ActivationQuantizer)


def _quantizer(config, field, role):
  name = getattr(config, field)
  none = ("none",) if field == "activation" else ()
  one_of(f"quant.{field}", name, (*none, *quant.NAMES))
  options = getattr(config, f"{field}_options")
  chosen = {key: value for key, value in options.items() if value is not None}
  try:
    quantizer = quant.get(name, bits=config.bits, **chosen)
  except (TypeError, ValueError) as error:
    group = "" if str(error).startswith("bits ") else f"{field}_options."
    raise ConfigError(f"quant.{group}{error}") from None
  if not isinstance(quantizer, role):
    raise ConfigError(
      f"quant.{field} must name a quantizer of type {role.__name__}, got "
      f"{name!r} of type {type(quantizer).__name__}"
    )
  return quantizer


def _check_data(config):
  if config.augment == "random_resized_crop" and not config.image_size:
    raise ConfigError(
      "data.image_size must be >= 1 with data.augment='random_resized_crop', "
      "got 0"
    )
  if config.name == "digits":
    plain = DataConfig()
    for field in ("augment", "image_size", "mean", "std", "workers"):
      value, only = getattr(config, field), getattr(plain, field)
      if value != only:
        raise ConfigError(
          f"data.{field} must be {only!r} with data.name='digits', got "
          f"{value!r}"
        )


def _check_training(config):
  """What each recipe needs of its own fields together."""
  for name in ("pretrain", "train", "supernet"):
    recipe = getattr(config, name)
    if not recipe.epochs and (name != "pretrain" or not config.model.weights):
      raise ConfigError(f"{name}.epochs must be >= 1, got {recipe.epochs}")
    try:
      train.resolve_vectorize(recipe.vectorize, recipe.schedule)
    except ValueError as error:
      raise ConfigError(f"{name}.{error}") from None
  count = len(config.quant.bits)
  for name in ("train", "supernet"):
    weights = getattr(config, name).loss_weights
    if weights and len(weights) != count:
      raise ConfigError(
        f"{name}.loss_weights must be {count} numbers, one for each of "
        f"quant.bits={config.quant.bits}, got {weights!r}"
      )


def _check_mixed(config):
  """What the stages hessian, supernet and search need."""
  traces = config.hessian
  if traces.max_probes < traces.min_probes:
    raise ConfigError(
      f"hessian.max_probes must be >= hessian.min_probes={traces.min_probes}, "
      f"got {traces.max_probes}"
    )
  recipe = config.supernet
  for field, only in (("sampling", "all"), ("curriculum", "none")):
    if getattr(recipe, field) != only:
      raise ConfigError(
        f"supernet.{field} must be {only!r}, since `hasb` draws the bits, got "
        f"{getattr(recipe, field)!r}"
      )
  if "supernet" in config.stages and config.quant.norm == "shared":
    raise ConfigError(
      "quant.norm must be switchable or transitional with the stage supernet, "
      "got 'shared'"
    )
  if "search" in config.stages:
    _check_search(config.search, config.data.holdout)


def _check_search(config, holdout):
  if config.eval_split != "train" and not 0 < holdout < 1:
    raise ConfigError(
      f"data.holdout must be > 0 and < 1 with search.eval_split="
      f"{config.eval_split!r}, got {holdout!r}"
    )
  for strategy, options in config.options.items():
    one_of("search.options", strategy, search.SEARCHES)
    if not isinstance(options, Mapping):
      raise ConfigError(
        f"search.options.{strategy} must be a group of options, got {options!r}"
      )
  for field in ("strategies", "costs", "budgets"):
    if not getattr(config, field):
      raise ConfigError(f"search.{field} must not be empty, got ()")
  if "latency" in config.costs and not config.latency:
    raise ConfigError(
      "search.latency must be a JSON file of {layer: {bits: seconds}} with the "
      "cost latency, got ''"
    )
  # Both name files.
  for field, shown in (("strategies", str), ("budgets", "{:g}".format)):
    names = list(map(shown, getattr(config, field)))
    for name in names:
      if names.count(name) > 1:
        raise ConfigError(
          f"search.{field} must be different, got {name} {names.count(name)} "
          "times"
        )


def _check_devices(config):
  """What an axis of bit-widths, or norms of single devices, need."""
  devices = config.devices
  if devices.bits > 1 and config.train.vectorize != "vmap":
    raise ConfigError(
      "devices.bits must be 1 with train.vectorize="
      f"{config.train.vectorize!r}, got {devices.bits}: spreading bit-widths "
      "over devices takes "
      "train.schedule='accumulate' and train.vectorize='vmap'"
    )
  if devices.norm == "per_device" and not (devices.data and devices.bits == 1):
    raise ConfigError(
      "devices.norm='per_device' needs a number of devices in devices.data, "
      "which decides what is trained, and devices.bits=1, got devices.data="
      f"{devices.data} and devices.bits={devices.bits}"
    )


def _check_pretrain(recipe):
  """A float network has no bit-widths to draw, teach or weigh."""
  plain = TrainConfig()
  for field in ("sampling", "distillation", "loss_weights", "curriculum"):
    value, only = getattr(recipe, field), getattr(plain, field)
    if value != only:
      raise ConfigError(
        f"pretrain.{field} must be {only!r} for a float network, got {value!r}"
      )


def _check_curriculum(config):
  """Phases that the norms or the distillation do not fit."""
  recipe, norm, bits = config.train, config.quant.norm, config.quant.bits
  for phase in train.CURRICULA[recipe.curriculum].phases:
    if phase.norm and norm not in ("switchable", phase.norm):
      raise ConfigError(
        f"quant.norm must be switchable or {phase.norm} with train.curriculum="
        f"{recipe.curriculum!r}, got {norm!r}"
      )
    sampling = phase.sampling or recipe.sampling
    passes = len(train.SAMPLINGS[sampling].labels(bits))
    if passes == 1 and len(bits) > 1 and recipe.distillation != "none":
      raise ConfigError(
        f"train.distillation must be none with sampling {sampling!r}, which "
        f"trains one bit-width a step, got {recipe.distillation!r}"
      )
