"""The configuration of a run.

Configuration files are ml_collections ConfigDicts; they end in `main`. Here a
plain nested dict becomes a `Config`, or one line says which field is wrong.

The fields load nothing of the library; `from_dict` and `quantizers`, which
check them, load all whose names they look up.
"""

import importlib
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
  from dr_jax.config.build import from_dict
  from dr_jax.config.checks import quantizers

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


def __getattr__(name: str) -> Any:
  modules = {"from_dict": "build", "quantizers": "checks"}
  if name in modules:
    module = importlib.import_module(f"dr_jax.config.{modules[name]}")
    return getattr(module, name)
  raise AttributeError(f"module 'dr_jax.config' has no attribute {name!r}")
