"""Mixed precision of ResNet50 on ImageNet, bits {4, 3, 2}, 3 on average.

  python -m dr_jax.main --config=configs/resnet50_mixed.py

As configs/resnet18_mixed.py in all but the network: its docstring says where
every number of the recipe comes from, and what ":8642", ":torchvision"
(resnet50.safetensors) and ":smoke" do.

Published top-1 accuracy in percent (arXiv 2502.01199, ImageNet), none of it
reproduced here: 75.06 at 3 bits on average, 75.24 with distillation.

Time, an estimate and not a measurement, from the operations in
configs/resnet50.py on eight A100: 4.2 hours of float training, 12.6 of joint
training (three bit-widths), 12.6 of the SuperNet; the traces, at most 512
products of about two gradients of 1,024 images each, below an hour.
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
  config.name = "_".join(filter(None, ("resnet50_mixed", digits, word)))
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
    ModelConfig, name="resnet50", options={"preactivation": True}
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
    config.model.weights = "resnet50.safetensors"
    config.model.options.preactivation = False
    config.pretrain.epochs = 0  # it is only scored
  return files.smoke(config) if word == "smoke" else config
