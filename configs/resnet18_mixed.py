"""Mixed precision of ResNet18 on ImageNet, bits {4, 3, 2}, 3 on average.

  python -m dr_jax.main --config=configs/resnet18_mixed.py

Float training, joint training, Hessian traces, a SuperNet trained by
Hessian-aware stochastic bit-switching, a search by integer programming, and an
artifact with the allocations found. Data, float and joint training are those of
configs/resnet18.py, whose docstring says where every number comes from.

  resnet18_mixed.py:8642   bits {8, 6, 4, 2}, 5 on average
  resnet18_mixed.py:smoke  a few steps on generated images, on any machine

Recipe, arXiv 2502.01199, section 3.3: traces from about 1,000 training images;
sigma rises from 0 to 1/2, and is 0 for the first 10 of 90 epochs; the SuperNet
starts from the multi-precision network; the budget is a mean bit-width over
layers ("sum_bits"); candidates are compared by inference, with no training.
What the paper does not state:

  SuperNet    optimizer, learning rate and 90 epochs as in the joint training
  candidates  compared on 0.4 % of the training images, which no training sees
              (5,100, held in memory: 3 GB)

Published top-1 accuracy in percent (arXiv 2502.01199, ImageNet), none of it
reproduced here: 68.85 at 3 bits on average, 69.92 with distillation
(--config.supernet.distillation=progressive); in its tables Bit-Mixer 62.90,
MultiQuant 69.20, EQ-Net 69.80.

Time, an estimate and not a measurement, from the operations in
configs/resnet18.py on eight A100: 1.9 hours of float training, 5.6 of joint
training (three bit-widths), 5.6 of the SuperNet; the traces, at most 512
products of about two gradients of 1,024 images each, minutes.
"""

import pathlib
import runpy

import ml_collections

_BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("resnet18.py")))


def get_config(arg=None):
  """Returns the configuration; see above for what `arg` can be."""
  return mixed_config("resnet18", arg)


def mixed_config(model, arg):
  """Returns a mixed-precision configuration for a network on ImageNet.

  Args:
    model: a name of `models.build`.
    arg: as for `imagenet_config` in configs/resnet18.py.
  """
  config = _BASE["imagenet_config"](model, arg, bits="432")
  config.name = config.name.replace(model, f"{model}_mixed")
  config.stages = (
    "pretrain",
    "multi_precision",
    "hessian",
    "supernet",
    "search",
    "export",
    "report",
  )
  config.data.holdout = 0.004

  config.hessian = ml_collections.ConfigDict()
  config.hessian.images = 1024
  config.hessian.batch_size = 128
  config.hessian.rel_stderr = 0.05
  config.hessian.min_probes = 8
  config.hessian.max_probes = 512

  config.supernet = ml_collections.ConfigDict()
  config.supernet.epochs = 90
  config.supernet.optimizer = "adam"
  config.supernet.learning_rate = 5e-4
  config.supernet.weight_decay = 5e-5
  config.supernet.schedule = "alternate"
  config.supernet.vectorize = "sequential"
  config.supernet.alrs = "eta"
  config.supernet.distillation = "none"

  config.hasb = ml_collections.ConfigDict()
  config.hasb.sigma = 0.5
  config.hasb.warmup = 1 / 9

  config.search = ml_collections.ConfigDict()
  config.search.strategies = ("hessian_ilp", "uniform", "proportional")
  config.search.costs = ("sum_bits",)
  bits = config.quant.bits
  config.search.budgets = (sum(bits) / len(bits),)
  config.search.eval_split = "held_out"
  config.search.metric = "accuracy"
  config.search.options = ml_collections.ConfigDict()
  if config.data.name == "generated":
    config.data.holdout = 0.25
    config.hessian.images = 8
    config.hessian.batch_size = 8
    config.hessian.max_probes = 8
    # Reached at once.
    config.hessian.rel_stderr = 1e6
    config.supernet.epochs = 1
  return config
