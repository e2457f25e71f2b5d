"""Checks of a configuration: every field by its constraints, then in pairs.

How many devices there are, and what is on disk, is not known here: the run
checks that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from dr_jax import quant, search, train
from dr_jax.config.constraints import BOUNDS, allowed_values
from dr_jax.config.fields import (
  Config,
  ConfigError,
  QuantConfig,
  TrainConfig,
  shown,
)

# Of float32, with its normal numbers only: smaller ones count as 0.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**128 * (1 - 2.0**-24)
# Of the groups and tuples in a field.
_DEEPEST = 8
# Of synthetic images, which are held in memory.
_LARGEST_DATA = 2**33
# Arguments of a network that other fields decide.
_IMPLIED = {
  "num_classes": "the data",
  "channels": "the data",
  "image_size": "the data",
  "vocabulary": "the data",
  "context": "the data",
  "dtype": "model.dtype",
}


def check(config: Config) -> None:
  """Checks a configuration.

  Raises:
    ConfigError: naming the first field that is wrong, its value and what it
      must be.
  """
  check_fields(config)
  quantizers(config.quant)
  _check_data(config.data)
  _check_model(config.model)
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
    rules = field.metadata
    if dataclasses.is_dataclass(value):
      check_fields(value, f"{name}.")
      continue
    if rules.get("nonempty") and not value:
      raise ConfigError(f"{name} must not be empty, got {value!r}")
    for entry in value if isinstance(value, tuple) else (value,):
      check_value(name, entry, rules)
    _check_plain(name, value)
    if rules.get("distinct"):
      _check_distinct(name, value)
    if "only_with" in rules:
      _check_effect(group, field, prefix)


def _check_effect(group, field, prefix):
  """A field that has no effect keeps its default."""
  other, values = field.metadata["only_with"]
  chosen, value = getattr(group, other), getattr(group, field.name)
  if chosen not in values and value != field.default:
    raise ConfigError(
      f"{prefix}{field.name} must be {field.default!r} with {prefix}{other}="
      f"{chosen!r}, where it has no effect, got {shown(value)}"
    )


def _check_distinct(name, entries):
  for entry in entries:
    if (count := entries.count(entry)) > 1:
      raise ConfigError(f"{name} must be different, got {entry} {count} times")


def _check_plain(name, value, depth=0):
  """What JSON can hold, float32 and int64 can hold, and files can be named."""
  if isinstance(value, Mapping | list | tuple):
    if depth == _DEEPEST:
      raise ConfigError(f"{name} must be nested at most {_DEEPEST} deep")
    named = isinstance(value, Mapping)
    for key, entry in value.items() if named else enumerate(value):
      if named and not isinstance(key, str):
        raise ConfigError(f"{name} must have names as keys, got {shown(key)}")
      _check_plain(f"{name}.{key}" if named else name, entry, depth + 1)
    return
  if isinstance(value, str):
    allowed, words = "\0" not in value, "without NUL characters"
  elif isinstance(value, float):
    # NaN is not among them.
    allowed = value == 0 or _SMALLEST <= abs(value) <= _LARGEST
    words = f"finite, 0 or from {_SMALLEST:.2g} to {_LARGEST:.2g} in magnitude"
  elif isinstance(value, int):
    allowed, words = -(2**63) <= value < 2**63, "an integer of 64 bits"
  else:
    allowed, words = value is None, "of numbers, strings, tuples and dicts"
  if not allowed:
    raise ConfigError(f"{name} must be {words}, got {shown(value)}")


def check_value(name: str, value: Any, constraints: Mapping[str, Any]) -> None:
  """Checks one value, or one entry of a tuple, by the metadata of a field.

  Raises:
    ConfigError: naming the field as `name`.
  """
  kinds = constraints.get("each")
  if kinds and (isinstance(value, bool) or not isinstance(value, kinds)):
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    words = " or ".join(kind.__name__ for kind in kinds)
    raise ConfigError(
      f"{name} must be a tuple of {words}, got {shown(value)} in it"
    )
  if "one_of" in constraints:
    one_of(name, value, allowed_values(constraints["one_of"]))
  if "pattern" in constraints:
    pattern, words = constraints["pattern"]
    if not re.fullmatch(pattern, value):
      raise ConfigError(f"{name} must be {words}, got {shown(value)}")
  for key, (text, holds) in BOUNDS.items():
    if key in constraints and not holds(value, constraints[key]):
      raise ConfigError(
        f"{name} must be {text.format(constraints[key])}, got {shown(value)}"
      )


def one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
  """Raises ConfigError unless a value is one of those allowed."""
  if value not in allowed:
    known = ", ".join(map(str, allowed))
    raise ConfigError(f"{name} must be one of {known}, got {shown(value)}")


def quantizers(
  config: QuantConfig,
) -> tuple[quant.WeightQuantizer, quant.ActivationQuantizer | None]:
  """Builds the quantizers of a configuration.

  Raises:
    ConfigError: for a name, a bit-width or an option that is not allowed.
  """
  weight = _quantizer(config, "weight")
  if config.activation == "none":
    if config.activation_options:
      raise ConfigError(
        "quant.activation_options must be empty with quant.activation='none', "
        f"got {shown(config.activation_options)}"
      )
    return weight, None
  return weight, _quantizer(config, "activation")


def _quantizer(config: QuantConfig, field: str) -> Any:
  name = getattr(config, field)
  rules = {rule.name: rule.metadata for rule in dataclasses.fields(config)}
  check_value(f"quant.{field}", name, rules[field])
  options = getattr(config, f"{field}_options")
  chosen = {key: value for key, value in options.items() if value is not None}
  try:
    return quant.get(name, bits=config.bits, **chosen)
  except (TypeError, ValueError) as error:
    group = "" if str(error).startswith("bits ") else f"{field}_options."
    raise ConfigError(f"quant.{group}{error}") from None


def _check_data(config):
  if config.augment == "random_resized_crop" and not config.image_size:
    raise ConfigError(
      "data.image_size must be >= 1 with data.augment='random_resized_crop', "
      "got 0"
    )
  size = config.examples * (config.image_size or 32) ** 2 * config.channels
  if config.name == "synthetic" and size > _LARGEST_DATA:
    raise ConfigError(
      f"data.examples must be such that the images take at most "
      f"{_LARGEST_DATA / 2**30:g} GiB, got {config.examples} of "
      f"{size / 2**30:,.1f} GiB"
    )


def _check_model(config):
  for option, owner in _IMPLIED.items():
    if option in config.options:
      raise ConfigError(
        f"model.options must not have {option}, which {owner} decides, got "
        f"{shown(config.options[option])}"
      )


def _check_training(config):
  """What each recipe needs of its own fields together."""
  for name in ("pretrain", "train", "supernet"):
    recipe = getattr(config, name)
    if not recipe.epochs and (name != "pretrain" or not config.model.weights):
      raise ConfigError(f"{name}.epochs must be >= 1, got {recipe.epochs}")
    try:
      train.check_vectorize(recipe.vectorize, recipe.schedule)
    except ValueError as error:
      raise ConfigError(f"{name}.{error}") from None
    if recipe.vectorize == "sequential" and recipe.steps_per_call > 1:
      raise ConfigError(
        f"{name}.steps_per_call must be 1 with {name}.vectorize='sequential', "
        f"which has no program of a whole step, got {recipe.steps_per_call}"
      )
    _check_validation(name, recipe, config.data.holdout)
  count = len(config.quant.bits)
  for name in ("train", "supernet"):
    weights = getattr(config, name).loss_weights
    if weights and len(weights) != count:
      raise ConfigError(
        f"{name}.loss_weights must be {count} numbers, one for each of "
        f"quant.bits={config.quant.bits}, got {shown(weights)}"
      )
    if weights and not any(weights):
      raise ConfigError(
        f"{name}.loss_weights must have one > 0, got {shown(weights)}"
      )


def _check_validation(name, recipe, holdout):
  if not recipe.validation_every:
    if recipe.keep_best:
      raise ConfigError(
        f"{name}.keep_best must be False with {name}.validation_every=0, got "
        "True"
      )
    return
  if not holdout:
    raise ConfigError(
      f"data.holdout must be > 0 with {name}.validation_every="
      f"{recipe.validation_every}, got {holdout!r}"
    )
  if recipe.curriculum != "none":
    raise ConfigError(
      f"{name}.validation_every must be 0 with {name}.curriculum="
      f"{recipe.curriculum!r}, whose statistics are re-estimated at its end, "
      f"got {recipe.validation_every}"
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
  _check_search(config.search)
  if "search" in config.stages:
    _check_search_stage(config.search, config.data.holdout)


def _check_search(config):
  # A budget is part of a file's name.
  names = [f"{budget:g}" for budget in config.budgets]
  _check_distinct("search.budgets", names)
  layers = [layer for group in config.ties for layer in group]
  for layer in (*layers, *config.pinned):
    if not isinstance(layer, str) or not layer:
      raise ConfigError(
        "search.ties and search.pinned must be of names of layers, got "
        f"{shown(layer)}"
      )
  _check_distinct("search.ties", layers)
  for layer, bits in config.pinned.items():
    if type(bits) is not int:
      raise ConfigError(
        f"search.pinned.{layer} must be a bit-width, got {shown(bits)}"
      )
  for strategy, options in config.options.items():
    _check_options(strategy, options, config.costs)


def _check_search_stage(config, holdout):
  if config.eval_split != "train" and not 0 < holdout < 1:
    raise ConfigError(
      f"data.holdout must be > 0 and < 1 with search.eval_split="
      f"{config.eval_split!r}, got {holdout!r}"
    )
  if "latency" in config.costs and not config.latency:
    raise ConfigError(
      "search.latency must be a file of dr_jax.benchmarks.latency with the "
      "cost latency, got ''"
    )
  if not config.strategies:
    raise ConfigError("search.strategies must not be empty, got ()")


def _check_options(strategy, options, costs):
  name = f"search.options.{strategy}"
  one_of("search.options", strategy, search.SEARCHES)
  if not isinstance(options, Mapping):
    raise ConfigError(
      f"{name} must be a group of options, got {shown(options)}"
    )
  known = search.options_of(strategy)
  for option in options:
    if option not in known:
      raise ConfigError(
        f"{name} must have only the options {', '.join(known) or 'none'}, got "
        f"{option!r}"
      )
  try:
    search.check_options(search.SEARCHES[strategy], options)
  except ValueError as error:
    raise ConfigError(f"{name}.{error}") from None
  if "objective" in options:
    one_of(f"{name}.objective", options["objective"], search.OBJECTIVES)
  if options.get("per_cost") and len(costs) > 1:
    raise ConfigError(
      f"{name}.per_cost must be False with several search.costs, got True with "
      f"{', '.join(costs)}"
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
