"""What a run can be told, as frozen dataclasses with checked fields.

Configuration files are ml_collections ConfigDicts; they end in `main`. Here a
plain nested dict becomes a `Config`, or one line says which field is wrong.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from dr_jax import nn, quant
from dr_jax.train import OPTIMIZERS, SCHEDULES, VECTORIZE, alrs

STAGES = ("pretrain", "multi_precision", "separate", "export", "report")


class ConfigError(ValueError):
  """A field of the configuration is wrong: one line with field and value."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which data, and how many examples a step sees."""

  name: str = "digits"
  batch_size: int = 128


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A network of `models.build`; classes and channels come from the data."""

  name: str = "resnet20"
  options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
  """Candidate bit-widths and the quantizers of `quant.get`.

  An entry None of `weight_options` leaves that option to the method.
  """

  bits: tuple = (8, 6, 4, 2)
  weight: str = "double_rounding"
  weight_options: dict = dataclasses.field(default_factory=dict)
  activation: str = "lsq_activation"
  norm: str = "switchable"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training recipe; the learning rate falls to zero as a cosine."""

  epochs: int = 10
  optimizer: str = "adam"
  learning_rate: float = 5e-4
  weight_decay: float = 5e-5
  momentum: float = 0.9
  schedule: str = "alternate"
  vectorize: str = "auto"
  alrs: str = "none"


@dataclasses.dataclass(frozen=True)
class Config:
  """A run."""

  name: str = "run"
  seed: int = 0
  stages: tuple = ("pretrain", "multi_precision", "export", "report")
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  quant: QuantConfig = QuantConfig()
  pretrain: TrainConfig = TrainConfig()
  train: TrainConfig = TrainConfig(alrs="eta")
  checkpoint_every: int = 100
  log_every: int = 10


def from_dict(values: Mapping[str, Any]) -> Config:
  """Builds a checked configuration; missing fields keep their defaults.

  Raises:
    ConfigError: for an unknown field, a wrong type, or a value that is not
      allowed, naming the field, the value and what is allowed.
  """
  config = _build(Config, values, "")
  try:
    quant.check_bits(config.quant.bits)
  except ValueError as error:
    raise ConfigError(f"quant.{error}") from None
  _one_of("quant.weight", config.quant.weight, quant.NAMES)
  _one_of("quant.activation", config.quant.activation, quant.NAMES)
  _one_of("quant.norm", config.quant.norm, nn.NORMS)
  for stage in config.stages:
    _one_of("stages", stage, STAGES)
  if "multi_precision" not in config.stages and "export" in config.stages:
    raise ConfigError("stages: export is allowed after multi_precision only")
  for name in ("checkpoint_every", "log_every"):
    _at_least(name, getattr(config, name), 1)
  _at_least("seed", config.seed, 0)
  _at_least("data.batch_size", config.data.batch_size, 1)
  for name in ("pretrain", "train"):
    _check_recipe(name, getattr(config, name))
  return config


def _check_recipe(name, recipe):
  _at_least(f"{name}.epochs", recipe.epochs, 1)
  for field in ("learning_rate", "weight_decay", "momentum"):
    _at_least(f"{name}.{field}", getattr(recipe, field), 0)
  _one_of(f"{name}.optimizer", recipe.optimizer, OPTIMIZERS)
  _one_of(f"{name}.schedule", recipe.schedule, SCHEDULES)
  _one_of(f"{name}.vectorize", recipe.vectorize, VECTORIZE)
  _one_of(f"{name}.alrs", recipe.alrs, alrs.MODES)


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


def _at_least(name, value, least):
  # Written so that NaN fails too.
  if not value >= least:
    raise ConfigError(f"{name}={value!r}: allowed is {least} or more")
