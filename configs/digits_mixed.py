"""Mixed precision on scikit-learn's handwritten digits, from float to export.

  python -m dr_jax.main --config=configs/digits_mixed.py

Float training, joint training at {8, 6, 4, 2} bits, Hessian traces, a SuperNet
trained by Hessian-aware stochastic bit-switching, every search at budgets of
2.5 to 7 mean bits, and an artifact with the allocations found. The network, a
pre-activation ResNet14 of 4 to 16 channels, is narrow enough that bits matter
and has 14 quantized layers. Searches score assignments on all images but those
of the test set: a fifth of the training images is held out, but 251 images
alone rank good assignments poorly.

arXiv 2502.01199, section 3.3; searches in dr_jax/search.
`python -m dr_jax.benchmarks.mixed` gives means over seeds.
"""

import pathlib
import runpy

import ml_collections

_DIGITS = runpy.run_path(str(pathlib.Path(__file__).with_name("digits.py")))


def get_config(arg=None):
  """Returns the configuration; "432" as argument takes bits {4, 3, 2}."""
  config = _DIGITS["get_config"](arg)
  config.name = config.name.replace("digits", "digits_mixed")
  config.stages = (
    "pretrain",
    "multi_precision",
    "hessian",
    "supernet",
    "search",
    "export",
    "report",
  )
  config.data.holdout = 0.2
  config.model.options.depth = 14
  config.model.options.widths = (4, 8, 16)
  config.pretrain.epochs = 60
  config.train.epochs = 60

  config.hessian = ml_collections.ConfigDict()
  config.hessian.images = 1024
  config.hessian.batch_size = 256
  config.hessian.rel_stderr = 0.05
  config.hessian.min_probes = 8
  config.hessian.max_probes = 512

  config.supernet = ml_collections.ConfigDict()
  config.supernet.epochs = 60
  config.supernet.optimizer = "adam"
  config.supernet.learning_rate = 1e-3
  config.supernet.weight_decay = 5e-5
  config.supernet.momentum = 0.9
  config.supernet.schedule = "alternate"
  config.supernet.vectorize = "sequential"
  config.supernet.alrs = "eta"
  config.supernet.distillation = "none"

  config.hasb = ml_collections.ConfigDict()
  config.hasb.sigma = 0.5
  config.hasb.warmup = 1 / 9

  config.search = ml_collections.ConfigDict()
  config.search.strategies = (
    "hessian_ilp",
    "greedy",
    "genetic",
    "edmips",
    "dnas",
    "reinforce",
    "uniform",
    "random",
    "proportional",
  )
  config.search.costs = ("stored_bits",)
  config.search.budgets = (2.5, 3.0, 4.0, 5.0, 6.0, 7.0)
  config.search.eval_split = "both"
  config.search.metric = "loss"
  config.search.options = ml_collections.ConfigDict()
  config.search.latency = ""
  return config
