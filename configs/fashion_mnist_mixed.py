"""Mixed precision on Fashion-MNIST, from float to export.

  python -m dr_jax.main --config=configs/fashion_mnist_mixed.py

The stages of configs/digits_mixed.py on 60,000 images, of which a twentieth is
held out to score assignments, and 10,000 to test on: float training, joint
training at {8, 6, 4, 2} bits, Hessian traces, a SuperNet trained by
Hessian-aware stochastic bit-switching, searches at budgets of 2.5 to 6 mean
bits, and an artifact with the allocations found. The network, a pre-activation
ResNet14 whose stem has stride 2, has 14 quantized layers. Scales are updated in
proportion to their size, as in configs/fashion_mnist.py.

configs/README.md says where the files are expected, and has the command that
fetches them. arXiv 2502.01199, section 3.3; searches in dr_jax/search.
`python -m dr_jax.benchmarks.mixed --config=configs/fashion_mnist_mixed.py
--workdir=DIR` gives means over seeds.
"""

from ml_collections import ConfigDict

from dr_jax.config import (
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
  config.name = "_".join(filter(None, ("fashion_mnist_mixed", digits)))
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
  config.checkpoint_every = 1000
  config.log_every = 50
  config.method = "double_rounding"
  config.data = files.fashion_mnist(batch_size=128, holdout=0.05)
  config.devices = files.group(DevicesConfig)
  options = {"depth": 14, "widths": (16, 32, 64), "stem_stride": 2}
  config.model = files.group(ModelConfig, name="resnet", options=options)
  config.quant = files.quant_group(map(int, digits or "8642"))
  config.quant.init = "mse"
  config.pretrain = files.group(
    TrainConfig, epochs=6, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4
  )
  config.train = files.train_group(epochs=3, learning_rate=5e-4)
  config.train.alrs = "proportional"
  config.hessian = files.group(HessianConfig)
  config.supernet = files.group(
    TrainConfig,
    epochs=3,
    learning_rate=5e-4,
    vectorize="sequential",
    alrs="proportional",
  )
  config.hasb = files.group(HasbConfig)
  config.search = files.group(
    SearchConfig,
    strategies=(
      "hessian_ilp",
      "greedy",
      "genetic",
      "uniform",
      "random",
      "proportional",
    ),
    budgets=(2.5, 3.0, 4.0, 6.0),
    # 100 evaluations for each budget instead of 1,000.
    options={
      "genetic": {
        "population": 20,
        "generations": 5,
        "crossover": 10,
        "mutation": 10,
      }
    },
  )
  return config
