"""Every method on digits: one float start, one data order, one table.

  python -m dr_jax.main --config=configs/compare.py [--workdir=DIR]
  python -m dr_jax.main --config=configs/compare.py:lsq,adabits

Each method trains with what belongs to it (`quant.RECIPES`: schedule, sampling,
distillation, activations, curriculum) and shares the rest: Adam, learning rate,
epochs, seeds. The network is narrow on purpose, a pre-activation ResNet8 of 4,
8 and 16 channels: wide ones reach 99 % at every bit-width and show nothing. 540
test images leave about half a point of noise in a single accuracy, hence three
seeds, and cross-entropy next to it.
"""

import dataclasses

import ml_collections
from ml_collections import config_dict

from dr_jax import quant
from dr_jax.config import DataConfig, DevicesConfig

BITS = (8, 6, 4, 2)
# Methods that serve any bit-widths from one network; those with a bit-width of
# their own; and LSQ and LSQ+ trained separately at each.
METHODS = {
  **{name: recipe.bits or BITS for name, recipe in quant.RECIPES.items()},
  **{f"separate_lsq_{b}": (b,) for b in BITS},
  **{f"separate_lsq_plus_{b}": (b,) for b in BITS},
}


def get_config(arg=None):
  """Returns the comparison; the argument names methods, by default all."""
  chosen = arg.split(",") if arg else list(METHODS)
  for name in chosen:
    if name not in METHODS:
      known = ", ".join(METHODS)
      raise ValueError(f"methods must be of {known}, got {name!r}")
  config = ml_collections.ConfigDict()
  config.name = "compare"
  config.seeds = (0, 1, 2)
  config.checkpoint_every = 1000
  config.log_every = 20

  # Every field of the group, as the library has it.
  config.data = ml_collections.ConfigDict(dataclasses.asdict(DataConfig()))
  config.data.name = "digits"
  config.data.batch_size = 128

  config.devices = ml_collections.ConfigDict(
    dataclasses.asdict(DevicesConfig())
  )

  config.model = ml_collections.ConfigDict()
  config.model.name = "resnet"
  config.model.options = ml_collections.ConfigDict()
  config.model.options.depth = 8
  config.model.options.widths = (4, 8, 16)

  config.quant = ml_collections.ConfigDict()
  config.quant.bits = BITS

  config.pretrain = ml_collections.ConfigDict()
  config.pretrain.epochs = 40
  config.pretrain.optimizer = "sgd"
  config.pretrain.learning_rate = 0.1

  config.train = ml_collections.ConfigDict()
  config.train.epochs = 40
  config.train.optimizer = "adam"
  config.train.learning_rate = 2e-3
  config.train.vectorize = "sequential"
  # Set by a flag they hold for every method; else each has its own.
  for field in ("schedule", "sampling", "distillation", "alrs"):
    config.train[field] = config_dict.placeholder(str)

  config.methods = ml_collections.ConfigDict()
  for name in chosen:
    method = ml_collections.ConfigDict()
    method.method, method.row = name, name.replace("_", " ")
    if name.startswith("separate"):
      method.row = name.rpartition("_")[0].replace("_", " ")
      method.method = method.row.removeprefix("separate ").replace(" ", "_")
    if METHODS[name] != BITS:
      method.quant = ml_collections.ConfigDict()
      method.quant.bits = METHODS[name]
    config.methods[name] = method
  return config
