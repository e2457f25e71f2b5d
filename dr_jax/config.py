"""What a run can be told, as frozen dataclasses with checked fields.

Configuration files are ml_collections ConfigDicts; they end in `main`. Here a
plain nested dict becomes a `Config`, or one line says which field is wrong.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from dr_jax import data, nn, quant, search, sharding
from dr_jax.train import (
  CURRICULA,
  DISTILLATIONS,
  OPTIMIZERS,
  RECIPES,
  SAMPLINGS,
  SCHEDULES,
  VECTORIZE,
  alrs,
  hasb,
  resolve_vectorize,
)

STAGES = (
  "pretrain",
  "multi_precision",
  "separate",
  "hessian",
  "supernet",
  "search",
  "export",
  "report",
)
DTYPES = ("float32", "bfloat16")
# What a stage needs to come before it.
_NEEDS = {
  "export": ("multi_precision",),
  "hessian": ("pretrain", "multi_precision"),
  "supernet": ("hessian",),
  "search": ("supernet",),
}


class ConfigError(ValueError):
  """A field of the configuration is wrong: one line with field and value."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which data, and how many examples a step sees; see `data.load`.

  `holdout` is the share of the training examples that no training sees and
  searches are judged on, `workers` the number of processes that decode images;
  0 decodes between the steps.
  """

  name: str = "digits"
  batch_size: int = 128
  holdout: float = 0.0
  path: str = ""
  dataset: str = ""
  train_split: str = "train"
  test_split: str = "test"
  augment: str = "none"
  image_size: int = 0
  mean: tuple = ()
  std: tuple = ()
  workers: int = 0
  damaged: str = "raise"
  classes: int = 10
  examples: int = 64
  channels: int = 3


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A network of `models.build`; classes and channels come from the data.

  `weights` is the path of a safetensors file with torchvision's names, from
  which the float network starts; it may then be trained no further, with no
  stage pretrain, or with `pretrain.epochs` 0 to have it scored. `dtype` is the
  type in which the network computes; its parameters are float32.
  """

  name: str = "resnet20"
  options: dict = dataclasses.field(default_factory=dict)
  weights: str = ""
  dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class QuantConfig:
  """Candidate bit-widths and the quantizers of `quant.get`.

  An entry None of the options leaves that option to the method; activation
  "none" leaves the layers' inputs float.
  """

  bits: tuple = (8, 6, 4, 2)
  weight: str = "double_rounding"
  weight_options: dict = dataclasses.field(default_factory=dict)
  activation: str = "lsq_activation"
  activation_options: dict = dataclasses.field(default_factory=dict)
  norm: str = "switchable"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training recipe; the learning rate falls to zero as a cosine.

  For `Config.train`, `from_dict` takes what is not set from the method.
  """

  epochs: int = 10
  optimizer: str = "adam"
  learning_rate: float = 5e-4
  weight_decay: float = 5e-5
  momentum: float = 0.9
  schedule: str = "alternate"
  vectorize: str = "auto"
  alrs: str = "none"
  sampling: str = "all"
  distillation: str = "none"
  loss_weights: tuple = ()
  curriculum: str = "none"


@dataclasses.dataclass(frozen=True)
class HessianConfig:
  """Traces of the float network's Hessian; see `hessian.trace`.

  `images` of the training set are used, or all if there are fewer.
  """

  images: int = 1024
  batch_size: int = 256
  rel_stderr: float = 0.05
  min_probes: int = 8
  max_probes: int = 512


@dataclasses.dataclass(frozen=True)
class HasbConfig:
  """Stochastic bit-switching of the SuperNet; see `train.hasb.sampling`."""

  sigma: float = 0.5
  warmup: float = hasb.WARMUP


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """Which searches look for an allocation, and under which budgets.

  A budget is a mean bit-width: the network may cost what it would with that
  bit-width everywhere, in each of `costs` ("stored_bits", "bops", "sum_bits",
  or "latency", with a table {layer: {bits: seconds}} in a JSON file).
  `options` are keyword arguments by strategy, `ties` groups of layer names
  that share a bit-width, `pinned` bit-widths by layer name. `judge` says which
  images assignments are scored on: "held_out" (`data.holdout`), "train", or
  "both"; never the test set.
  """

  strategies: tuple = tuple(search.SEARCHES)
  costs: tuple = ("stored_bits",)
  budgets: tuple = (3.0, 4.0, 5.0, 6.0)
  options: dict = dataclasses.field(default_factory=dict)
  judge: str = "held_out"
  prefer: str = "loss"
  latency: str = ""
  ties: tuple = ()
  pinned: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DevicesConfig:
  """How training is spread over devices; see `sharding.Layout`.

  `data` devices along the axis "data", 0 for all there are; `bits` along the
  axis "bits" (for `vectorize="vmap"`); `parameters` "replicated" or "sharded";
  `norm` "global" or "per_device".
  """

  data: int = 0
  bits: int = 1
  parameters: str = "replicated"
  norm: str = "global"


@dataclasses.dataclass(frozen=True)
class Config:
  """A run.

  `method` names a recipe of `train.RECIPES`, from which `from_dict` takes the
  fields of `quant` and `train` that are not set.
  """

  name: str = "run"
  method: str = "double_rounding"
  seed: int = 0
  stages: tuple = ("pretrain", "multi_precision", "export", "report")
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  quant: QuantConfig = QuantConfig()
  pretrain: TrainConfig = TrainConfig()
  train: TrainConfig = TrainConfig(alrs="eta")
  hessian: HessianConfig = HessianConfig()
  supernet: TrainConfig = TrainConfig(alrs="eta", vectorize="sequential")
  hasb: HasbConfig = HasbConfig()
  search: SearchConfig = SearchConfig()
  devices: DevicesConfig = DevicesConfig()
  checkpoint_every: int = 100
  log_every: int = 10


def from_dict(values: Mapping[str, Any]) -> Config:
  """Builds a checked configuration.

  Fields that are missing or None take the value of the method's recipe, or
  else their default.

  Raises:
    ConfigError: for an unknown field, a wrong type, or a value that is not
      allowed, naming the field, the value and what is allowed.
  """
  config = _with_recipe(_build(Config, values, ""), values)
  quantizers(config.quant)
  _one_of("quant.norm", config.quant.norm, nn.NORMS)
  _one_of("model.dtype", config.model.dtype, DTYPES)
  _check_stages(config.stages, bool(config.model.weights))
  for name in ("checkpoint_every", "log_every"):
    _at_least(name, getattr(config, name), 1)
  _at_least("seed", config.seed, 0)
  _check_data(config.data)
  _at_least("devices.data", config.devices.data, 0)
  _at_least("devices.bits", config.devices.bits, 1)
  _one_of("devices.parameters", config.devices.parameters, sharding.PARAMETERS)
  _one_of("devices.norm", config.devices.norm, sharding.NORMS)
  _check_devices(config)
  for name in ("pretrain", "train", "supernet"):
    trained = name != "pretrain" or not config.model.weights
    _at_least(f"{name}.epochs", getattr(config, name).epochs, int(trained))
    _check_recipe(name, getattr(config, name))
  _check_pretrain(config.pretrain)
  _check_curriculum(config)
  _check_mixed(config)
  count = len(config.quant.bits)
  for name in ("train", "supernet"):
    weights = getattr(config, name).loss_weights
    if weights and len(weights) != count:
      raise ConfigError(
        f"{name}.loss_weights={weights!r}: allowed are {count} numbers, one "
        f"for each of quant.bits={config.quant.bits}"
      )
  return config


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
  _one_of(f"quant.{field}", name, (*none, *quant.NAMES))
  options = getattr(config, f"{field}_options")
  chosen = {key: value for key, value in options.items() if value is not None}
  try:
    quantizer = quant.get(name, bits=config.bits, **chosen)
  except (TypeError, ValueError) as error:
    where = "" if str(error).startswith("bits=") else f"{field}_options: "
    raise ConfigError(f"quant.{where}{error}") from None
  if not isinstance(quantizer, role):
    raise ConfigError(
      f"quant.{field}={name!r}: is of kind {type(quantizer).__name__}; "
      f"allowed is {role.__name__}"
    )
  return quantizer


def _check_data(config):
  for field, least in (
    ("batch_size", 1),
    ("image_size", 0),
    ("workers", 0),
    ("classes", 1),
    ("examples", 1),
  ):
    _at_least(f"data.{field}", getattr(config, field), least)
  _one_of("data.augment", config.augment, data.AUGMENT)
  _one_of("data.damaged", config.damaged, ("raise", "skip"))
  if config.channels not in (1, 3):
    raise ConfigError(f"data.channels={config.channels!r}: allowed are 1, 3")
  if config.augment == "random_resized_crop" and not config.image_size:
    raise ConfigError(
      "data.image_size=0: allowed with data.augment='random_resized_crop' is "
      "1 or more"
    )
  for field in ("mean", "std"):
    values = getattr(config, field)
    if not all(type(v) in (int, float) and math.isfinite(v) for v in values):
      raise ConfigError(f"data.{field}={values!r}: allowed are finite numbers")
  for value in config.std:
    _above("data.std", value, 0)
  if config.name == "digits":
    plain = DataConfig()
    for field in ("augment", "image_size", "mean", "std", "workers"):
      value, allowed = getattr(config, field), getattr(plain, field)
      if value != allowed:
        raise ConfigError(
          f"data.{field}={value!r}: allowed with data.name='digits' is "
          f"{allowed!r}"
        )


def _check_recipe(name, recipe):
  for field in ("learning_rate", "weight_decay", "momentum"):
    _at_least(f"{name}.{field}", getattr(recipe, field), 0)
  _one_of(f"{name}.optimizer", recipe.optimizer, OPTIMIZERS)
  _one_of(f"{name}.schedule", recipe.schedule, SCHEDULES)
  _one_of(f"{name}.vectorize", recipe.vectorize, VECTORIZE)
  try:
    resolve_vectorize(recipe.vectorize, recipe.schedule)
  except ValueError as error:
    raise ConfigError(f"{name}.{error}") from None
  _one_of(f"{name}.alrs", recipe.alrs, alrs.MODES)
  _one_of(f"{name}.sampling", recipe.sampling, SAMPLINGS)
  _one_of(f"{name}.distillation", recipe.distillation, DISTILLATIONS)
  _one_of(f"{name}.curriculum", recipe.curriculum, CURRICULA)
  for weight in recipe.loss_weights:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
      raise ConfigError(
        f"{name}.loss_weights={recipe.loss_weights!r}: allowed are numbers"
      )
    _at_least(f"{name}.loss_weights", weight, 0)
    if math.isinf(weight):
      raise ConfigError(
        f"{name}.loss_weights={recipe.loss_weights!r}: allowed are finite "
        "numbers"
      )


def _check_stages(stages, has_weights):
  for number, stage in enumerate(stages):
    _one_of("stages", stage, STAGES)
    for needed in _NEEDS.get(stage, ()):
      if needed == "pretrain" and has_weights:
        continue
      if needed not in stages[:number]:
        raise ConfigError(f"stages: {stage} is allowed after {needed} only")


def _check_mixed(config):
  """What the stages hessian, supernet and search are told."""
  traces = config.hessian
  for name, least in (("images", 1), ("batch_size", 1), ("min_probes", 2)):
    _at_least(f"hessian.{name}", getattr(traces, name), least)
  _at_least("hessian.max_probes", traces.max_probes, traces.min_probes)
  _above("hessian.rel_stderr", traces.rel_stderr, 0)
  for name in ("sigma", "warmup"):
    _share(f"hasb.{name}", getattr(config.hasb, name))
  _share("data.holdout", config.data.holdout)
  recipe = config.supernet
  for field, allowed in (("sampling", "all"), ("curriculum", "none")):
    if getattr(recipe, field) != allowed:
      raise ConfigError(
        f"supernet.{field}={getattr(recipe, field)!r}: allowed is {allowed!r};"
        " bits are drawn as `hasb` says"
      )
  if "supernet" in config.stages and config.quant.norm == "shared":
    raise ConfigError(
      "quant.norm='shared': allowed with the stage supernet are switchable, "
      "transitional"
    )
  if "search" in config.stages:
    _check_search(config.search, config.data.holdout)


def _check_search(wanted, holdout):
  _one_of("search.judge", wanted.judge, ("held_out", "train", "both"))
  if wanted.judge != "train" and not 0 < holdout < 1:
    raise ConfigError(
      f"data.holdout={holdout!r}: allowed with search.judge={wanted.judge!r} "
      "are shares above 0 and below 1"
    )
  for strategy in wanted.strategies:
    _one_of("search.strategies", strategy, search.SEARCHES)
  for strategy, options in wanted.options.items():
    _one_of("search.options", strategy, search.SEARCHES)
    if not isinstance(options, Mapping):
      raise ConfigError(
        f"search.options.{strategy}={options!r}: allowed is a group of options"
      )
  for group in wanted.ties:
    if not isinstance(group, list | tuple):
      raise ConfigError(
        f"search.ties={wanted.ties!r}: allowed are groups of layer names, as "
        "(('conv1', 'conv2'),)"
      )
  costs = ("stored_bits", "bops", "sum_bits", "latency")
  for cost in wanted.costs:
    _one_of("search.costs", cost, costs)
  for field in ("strategies", "costs", "budgets"):
    if not getattr(wanted, field):
      raise ConfigError(f"search.{field}=(): allowed is at least one")
  if "latency" in wanted.costs and not wanted.latency:
    raise ConfigError(
      "search.latency='': allowed with the cost latency is a JSON file of "
      "{layer: {bits: seconds}}"
    )
  for budget in wanted.budgets:
    if isinstance(budget, bool) or not isinstance(budget, int | float):
      raise ConfigError(
        f"search.budgets={wanted.budgets!r}: allowed are mean bit-widths"
      )
    _above("search.budgets", budget, 0)
    if math.isinf(budget):
      raise ConfigError("search.budgets=inf: allowed are finite numbers")
  _one_of("search.prefer", wanted.prefer, ("loss", "accuracy"))
  # Both name files.
  for field, shown in (("strategies", str), ("budgets", "{:g}".format)):
    names = list(map(shown, getattr(wanted, field)))
    for name in names:
      if names.count(name) > 1:
        raise ConfigError(
          f"search.{field}: {name} is there {names.count(name)} times; allowed "
          "is once"
        )


def _check_devices(config):
  """What an axis of bit-widths, or norms of single devices, go with."""
  wanted = config.devices
  if wanted.bits > 1 and config.train.vectorize != "vmap":
    raise ConfigError(
      f"devices.bits={wanted.bits}: allowed with train.vectorize="
      f"{config.train.vectorize!r} is 1; spreading bit-widths over devices "
      "takes train.schedule='accumulate' and train.vectorize='vmap'"
    )
  if wanted.norm == "per_device" and not (wanted.data and wanted.bits == 1):
    raise ConfigError(
      f"devices.norm='per_device': with devices.data={wanted.data} and "
      f"devices.bits={wanted.bits}; allowed are a number of devices, which "
      "decides what is trained, and bits=1"
    )


def _check_pretrain(recipe):
  """A float network has no bit-widths to draw, teach or weigh."""
  plain = TrainConfig()
  for field in ("sampling", "distillation", "loss_weights", "curriculum"):
    value, allowed = getattr(recipe, field), getattr(plain, field)
    if value != allowed:
      raise ConfigError(
        f"pretrain.{field}={value!r}: allowed is {allowed!r}, the network "
        "being float"
      )


def _check_curriculum(config):
  """Phases that the norms or the distillation do not fit."""
  recipe, norm, bits = config.train, config.quant.norm, config.quant.bits
  for phase in CURRICULA[recipe.curriculum].phases:
    if phase.norm and norm not in ("switchable", phase.norm):
      raise ConfigError(
        f"quant.norm={norm!r}: allowed with train.curriculum="
        f"{recipe.curriculum!r} are switchable, {phase.norm}"
      )
    sampling = phase.sampling or recipe.sampling
    visits = len(SAMPLINGS[sampling].labels(bits))
    if visits == 1 and len(bits) > 1 and recipe.distillation != "none":
      raise ConfigError(
        f"train.distillation={recipe.distillation!r}: allowed with sampling "
        f"{sampling!r}, which visits one bit-width a step, is none"
      )


def _with_recipe(config, values):
  """Fills fields of `quant` and `train` that were left to the method."""
  _one_of("method", config.method, RECIPES)
  recipe = RECIPES[config.method]
  bits = config.quant.bits
  left = {"loss_weights": recipe.loss_weights(bits)} | recipe._asdict()
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
    raise ConfigError(f"{prefix[:-1]}={values!r}: allowed is a group of fields")
  types = typing.get_type_hints(kind)
  filled = {}
  for name, value in values.items():
    if name not in types:
      raise ConfigError(
        f"{prefix}{name}={value!r}: unknown field; allowed are "
        f"{', '.join(types)}"
      )
    if value is None:
      continue
    if dataclasses.is_dataclass(types[name]):
      filled[name] = _build(types[name], value, f"{prefix}{name}.")
    else:
      filled[name] = _typed(f"{prefix}{name}", value, types[name])
  return kind(**filled)


def _typed(name, value, kind):
  if kind is float and type(value) is int:
    value = float(value)
  if kind is tuple and isinstance(value, list):
    value = tuple(value)
  if kind is dict and isinstance(value, Mapping):
    value = dict(value)
  if type(value) is not kind:
    raise ConfigError(
      f"{name}={value!r}: has type {type(value).__name__}; allowed is "
      f"{kind.__name__}"
    )
  return value


def _one_of(name, value, allowed):
  if value not in allowed:
    raise ConfigError(f"{name}={value!r}: allowed are {', '.join(allowed)}")


def _above(name, value, bound):
  # Written so that NaN fails too.
  if not value > bound:
    raise ConfigError(f"{name}={value!r}: allowed is more than {bound}")


def _share(name, value):
  if not 0 <= value <= 1:
    raise ConfigError(f"{name}={value!r}: allowed are 0 to 1")


def _at_least(name, value, least):
  # Written so that NaN fails too.
  if not value >= least:
    raise ConfigError(f"{name}={value!r}: allowed is {least} or more")
