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

from ml_collections import ConfigDict

from dr_jax.config import (
  DataConfig,
  DevicesConfig,
  HasbConfig,
  HessianConfig,
  ModelConfig,
  SearchConfig,
  TrainConfig,
  files,
)


def get_config(arg=None):
  """Returns the configuration; "432" as argument takes bits {4, 3, 2}."""
  digits, _ = files.parse(arg)
  config = ConfigDict()
  config.name = f"digits_mixed_{digits}" if digits else "digits_mixed"
  config.seed = 0
  config.stages = (
    "pretrain",
    "multi_precision",
    "hessian",
    "supernet",
    "search",
    "export",
    "report",
  )
  config.checkpoint_every = 50
  config.log_every = 10
  config.method = "double_rounding"
  config.data = files.group(
    DataConfig, name="digits", batch_size=128, holdout=0.2
  )
  config.devices = files.group(DevicesConfig)
  config.model = files.group(
    ModelConfig, name="resnet", options={"depth": 14, "widths": (4, 8, 16)}
  )
  config.quant = files.quant_group(map(int, digits or "8642"))
  config.pretrain = files.group(
    TrainConfig, epochs=60, optimizer="sgd", learning_rate=0.1
  )
  config.train = files.train_group(epochs=60, learning_rate=1e-3)
  config.hessian = files.group(HessianConfig)
  config.supernet = files.group(
    TrainConfig,
    epochs=60,
    learning_rate=1e-3,
    vectorize="sequential",
    alrs="eta",
  )
  config.hasb = files.group(HasbConfig)
  config.search = files.group(
    SearchConfig,
    strategies=(
      "hessian_ilp",
      "greedy",
      "genetic",
      "edmips",
      "dnas",
      "reinforce",
      "uniform",
      "random",
      "proportional",
    ),
    costs=("stored_bits",),
    budgets=(2.5, 3.0, 4.0, 5.0, 6.0, 7.0),
    eval_split="both",
    metric="loss",
  )
  return config
