"""The configuration of a run.

Configuration files are ml_collections ConfigDicts; they end in `main`. Here a
plain nested dict becomes a `Config`, or one line says which field is wrong.
"""

from dr_jax.config.build import from_dict
from dr_jax.config.checks import quantizers
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
