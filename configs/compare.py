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

from ml_collections import ConfigDict

from dr_jax import quant
from dr_jax.config import (
  DataConfig,
  DevicesConfig,
  ModelConfig,
  TrainConfig,
  files,
)

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
  config = ConfigDict()
  config.name = "compare"
  config.seeds = (0, 1, 2)
  config.checkpoint_every = 1000
  config.log_every = 20

  config.data = files.group(DataConfig, name="digits", batch_size=128)
  config.devices = files.group(DevicesConfig)
  config.model = files.group(
    ModelConfig, name="resnet", options={"depth": 8, "widths": (4, 8, 16)}
  )
  config.quant = ConfigDict({"bits": BITS})
  config.pretrain = files.group(
    TrainConfig, epochs=40, optimizer="sgd", learning_rate=0.1
  )
  # What a flag sets here holds for every method; else each has its own.
  config.train = files.train_group(
    epochs=40, learning_rate=2e-3, vectorize="sequential"
  )

  config.methods = ConfigDict()
  for name in chosen:
    method = ConfigDict()
    method.method, method.row = name, name.replace("_", " ")
    if name.startswith("separate"):
      method.row = name.rpartition("_")[0].replace("_", " ")
      method.method = method.row.removeprefix("separate ").replace(" ", "_")
    if METHODS[name] != BITS:
      method.quant = ConfigDict()
      method.quant.bits = METHODS[name]
    config.methods[name] = method
  return config
