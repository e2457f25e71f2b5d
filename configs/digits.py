"""Double Rounding on scikit-learn's handwritten digits, bits {8, 6, 4, 2}.

  python -m dr_jax.main --config=configs/digits.py

1,797 real 8x8 images, which come with scikit-learn; stratified 70/30 split. A
pre-activation ResNet8 of 0.38 M parameters: float training, joint training at
four bit-widths, and one integer artifact that serves them all.

`--config.method=adabits` (any of quant.RECIPES) trains another method instead.
Add the stage "separate" to train LSQ at each bit-width for comparison;
`python -m dr_jax.benchmarks.digits` gives means over seeds. Recipe after arXiv
2502.01199, section 4 (Adam, cosine, weight decay 5e-5), with a larger learning
rate and fewer epochs.
"""

import dataclasses

import ml_collections
from ml_collections import config_dict

from dr_jax import quant
from dr_jax.config import DataConfig, DevicesConfig


def get_config(arg=None):
  """Returns the configuration; "432" as argument takes bits {4, 3, 2}."""
  if arg and not arg.isdecimal():
    raise ValueError(
      f"argument must be bit-widths, as digits.py:432, got {arg!r}"
    )
  config = ml_collections.ConfigDict()
  config.name = "digits" if not arg else f"digits_{arg}"
  config.seed = 0
  config.stages = ("pretrain", "multi_precision", "export", "report")
  config.checkpoint_every = 50
  config.log_every = 10

  # Every field of the group, as the library has it.
  config.data = ml_collections.ConfigDict(dataclasses.asdict(DataConfig()))
  config.data.name = "digits"
  config.data.batch_size = 128

  config.devices = ml_collections.ConfigDict(
    dataclasses.asdict(DevicesConfig())
  )

  config.model = ml_collections.ConfigDict()
  config.model.name = "resnet"
  config.model.weights = ""
  config.model.dtype = "float32"
  config.model.options = ml_collections.ConfigDict()
  config.model.options.depth = 8
  config.model.options.widths = (16, 64, 160)

  # What the method leaves open here is its own; see quant.RECIPES.
  config.method = "double_rounding"
  config.quant = ml_collections.ConfigDict()
  config.quant.bits = tuple(map(int, arg)) if arg else (8, 6, 4, 2)
  config.quant.weight = config_dict.placeholder(str)
  config.quant.weight_options = _left_open(quant.options_of("weight"))
  config.quant.activation = config_dict.placeholder(str)
  config.quant.activation_options = _left_open(quant.options_of("activation"))
  config.quant.norm = config_dict.placeholder(str)

  config.pretrain = ml_collections.ConfigDict()
  config.pretrain.epochs = 15
  config.pretrain.optimizer = "sgd"
  config.pretrain.learning_rate = 0.1
  config.pretrain.weight_decay = 5e-5
  config.pretrain.momentum = 0.9

  config.train = ml_collections.ConfigDict()
  config.train.epochs = 15
  config.train.optimizer = "adam"
  config.train.learning_rate = 1e-3
  config.train.weight_decay = 5e-5
  config.train.momentum = 0.9
  config.train.vectorize = "auto"
  config.train.schedule = config_dict.placeholder(str)
  config.train.sampling = config_dict.placeholder(str)
  config.train.distillation = config_dict.placeholder(str)
  config.train.loss_weights = config_dict.placeholder(tuple)
  config.train.alrs = config_dict.placeholder(str)
  config.train.curriculum = config_dict.placeholder(str)
  return config


def _left_open(types):
  """Fields that a flag can set; until then they are the method's own."""
  fields = {name: config_dict.placeholder(t) for name, t in types.items()}
  return ml_collections.ConfigDict(fields)
