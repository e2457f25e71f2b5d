"""The configuration of a run.

Configuration files are ml_collections ConfigDicts, in which a plain nested dict
becomes a checked `Config`, or one line says which field is wrong.

The fields load nothing of the library; `from_dict` and `quantizers`, which look
up its names, load it when they are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dr_jax.config.fields import (
  Config,
  ConfigError,
  DataConfig,
  DevicesConfig,
  HasbConfig,
  HessianConfig,
  ModelConfig,
  QuantConfig,
  SearchConfig,
  TrainConfig,
  prefixed,
)

if TYPE_CHECKING:
  from dr_jax.quant import ActivationQuantizer, WeightQuantizer

__all__ = [
  "Config",
  "ConfigError",
  "DataConfig",
  "DevicesConfig",
  "HasbConfig",
  "HessianConfig",
  "ModelConfig",
  "QuantConfig",
  "SearchConfig",
  "TrainConfig",
  "from_dict",
  "prefixed",
  "quantizers",
]


def from_dict(values: Mapping[str, Any]) -> Config:
  """Builds a checked configuration.

  Fields that are missing or None take the value of the method's recipe, or else
  their default.

  Args:
    values: nested dict, as `ConfigDict.to_dict` returns it.

  Raises:
    ConfigError: for an unknown field, a wrong type, or a value that a field
      does not allow, naming the field, the value and what it must be.

  >>> config = from_dict({"method": "lsq", "quant": {"bits": (8, 4)}})
  >>> config.quant.weight, config.quant.activation, config.train.epochs
  ('lsq', 'lsq_activation', 10)
  >>> from_dict({"train": {"epochs": -3}})
  Traceback (most recent call last):
  dr_jax.config.fields.ConfigError: train.epochs must be >= 0, got -3
  """
  from dr_jax.config import build

  return build.from_dict(values)


def quantizers(
  config: QuantConfig,
) -> tuple[WeightQuantizer, ActivationQuantizer | None]:
  """Builds the weight quantizer and the input quantizer of a configuration.

  Raises:
    ConfigError: for a name, a bit-width or an option that is not allowed.
  """
  from dr_jax.config import checks

  return checks.quantizers(config)
