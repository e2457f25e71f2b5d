"""What the fields of a configuration allow, each and together.

How many devices there are, and what is on disk, is not known here: `Run` asks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dr_jax import data, models, nn, quant, search
from dr_jax.config.fields import (
  DTYPES,
  STAGES,
  Config,
  ConfigError,
  DataConfig,
  QuantConfig,
  TrainConfig,
)
from dr_jax.train import (
  CURRICULA,
  DISTILLATIONS,
  OPTIMIZERS,
  SAMPLINGS,
  SCHEDULES,
  VECTORIZE,
  alrs,
  resolve_vectorize,
)

# What a stage needs to come before it.
_NEEDS = {
  "export": ("multi_precision",),
  "hessian": ("pretrain", "multi_precision"),
  "supernet": ("hessian",),
  "search": ("supernet",),
}


def check(config: Config) -> None:
  """Checks a configuration.

  Raises:
    ConfigError: for a value that is not allowed, naming the field, the value
      and what is allowed.
  """
  quantizers(config.quant)
  one_of("quant.norm", config.quant.norm, nn.NORMS)
  one_of("model.name", config.model.name, models.NAMES)
  one_of("model.dtype", config.model.dtype, DTYPES)
  _check_stages(config.stages, bool(config.model.weights))
  for name in ("checkpoint_every", "log_every"):
    _at_least(name, getattr(config, name), 1)
  _at_least("seed", config.seed, 0)
  _check_data(config.data)
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
    where = "" if str(error).startswith("bits=") else f"{field}_options: "
    raise ConfigError(f"quant.{where}{error}") from None
  if not isinstance(quantizer, role):
    raise ConfigError(
      f"quant.{field}={name!r}: is of kind {type(quantizer).__name__}; "
      f"allowed is {role.__name__}"
    )
  return quantizer


def _check_data(config):
  one_of("data.name", config.name, data.NAMES)
  for field, least in (
    ("batch_size", 1),
    ("image_size", 0),
    ("workers", 0),
    ("classes", 1),
    ("examples", 1),
  ):
    _at_least(f"data.{field}", getattr(config, field), least)
  one_of("data.augment", config.augment, data.AUGMENT)
  one_of("data.damaged", config.damaged, ("raise", "skip"))
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
  one_of(f"{name}.optimizer", recipe.optimizer, OPTIMIZERS)
  one_of(f"{name}.schedule", recipe.schedule, SCHEDULES)
  one_of(f"{name}.vectorize", recipe.vectorize, VECTORIZE)
  try:
    resolve_vectorize(recipe.vectorize, recipe.schedule)
  except ValueError as error:
    raise ConfigError(f"{name}.{error}") from None
  one_of(f"{name}.alrs", recipe.alrs, alrs.MODES)
  one_of(f"{name}.sampling", recipe.sampling, SAMPLINGS)
  one_of(f"{name}.distillation", recipe.distillation, DISTILLATIONS)
  one_of(f"{name}.curriculum", recipe.curriculum, CURRICULA)
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
    one_of("stages", stage, STAGES)
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
  one_of("search.judge", wanted.judge, ("held_out", "train", "both"))
  if wanted.judge != "train" and not 0 < holdout < 1:
    raise ConfigError(
      f"data.holdout={holdout!r}: allowed with search.judge={wanted.judge!r} "
      "are shares above 0 and below 1"
    )
  for strategy in wanted.strategies:
    one_of("search.strategies", strategy, search.SEARCHES)
  for strategy, options in wanted.options.items():
    one_of("search.options", strategy, search.SEARCHES)
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
    one_of("search.costs", cost, costs)
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
  one_of("search.prefer", wanted.prefer, ("loss", "accuracy"))
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


def one_of(name, value, allowed):
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
