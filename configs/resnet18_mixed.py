"""Mixed precision of ResNet18 on ImageNet, bits {4, 3, 2}, 3 on average.

  python -m dr_jax.main --config=configs/resnet18_mixed.py

Float training, joint training, Hessian traces, a SuperNet trained by
Hessian-aware stochastic bit-switching, a search by integer programming, and an
artifact with the allocations found. Data, float and joint training are those of
configs/resnet18.py, whose docstring says where every number comes from.

  resnet18_mixed.py:8642         bits {8, 6, 4, 2}, 5 on average
  resnet18_mixed.py:torchvision  starts from torchvision's float weights
  resnet18_mixed.py:smoke        a few steps on synthetic images, on any machine

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
  """Returns the configuration; see above for what `arg` can be."""
  digits, word = files.parse(arg, "smoke", "torchvision")
  config = ConfigDict()
  config.name = "_".join(filter(None, ("resnet18_mixed", digits, word)))
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
  config.log_every = 100
  config.method = "double_rounding"
  config.data = files.group(
    DataConfig,
    name="tfds",
    dataset="imagenet2012",
    test_split="validation",
    batch_size=256,
    holdout=0.004,
    augment="random_resized_crop",
    image_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    workers=32,
  )
  config.devices = files.group(DevicesConfig)
  config.model = files.group(
    ModelConfig, name="resnet18", options={"preactivation": True}
  )
  config.quant = files.quant_group(map(int, digits or "432"))
  config.pretrain = files.group(
    TrainConfig,
    epochs=90,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=1e-4,
  )
  config.train = files.train_group(epochs=90, learning_rate=5e-4)
  config.hessian = files.group(HessianConfig, batch_size=128)
  config.supernet = files.group(
    TrainConfig,
    epochs=90,
    learning_rate=5e-4,
    vectorize="sequential",
    alrs="eta",
  )
  config.hasb = files.group(HasbConfig, sigma=0.5, warmup=1 / 9)
  bits = config.quant.bits
  config.search = files.group(
    SearchConfig,
    strategies=("hessian_ilp", "uniform", "proportional"),
    costs=("sum_bits",),
    budgets=(sum(bits) / len(bits),),
    eval_split="held_out",
    metric="accuracy",
  )
  if word == "torchvision":
    config.model.weights = "resnet18.safetensors"
    config.model.options.preactivation = False
    config.pretrain.epochs = 0  # it is only scored
  return files.smoke(config) if word == "smoke" else config
