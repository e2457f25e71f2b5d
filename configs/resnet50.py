"""Double Rounding of ResNet50 on ImageNet, bits {8, 6, 4, 2}.

  python -m dr_jax.main --config=configs/resnet50.py

As configs/resnet18.py in all but the network: its docstring says where every
number of the recipe comes from, how to read a folder of images, and what
":432", ":torchvision" (resnet50.safetensors) and ":smoke" do. Pre-activation
bottlenecks, with the stride on the 3x3 convolution.

Published top-1 accuracy in percent (arXiv 2502.01199, ImageNet; in brackets
its float network, as torchvision's IMAGENET1K_V1), none of it reproduced here:

  bits                      8      6      4      3      2
  {8, 6, 4, 2} (76.13)  76.51  76.28  75.74         72.31
  with distillation     76.98  76.86  76.52         73.78
  {4, 3, 2}                           75.81  75.24  71.62

Time, an estimate and not a measurement: 1.28 M images x 90 epochs x 4
bit-widths x 3 passes x 2 x 4.09 G multiply-accumulates are 1.1e19 operations;
eight A100 at an assumed 15 % of 156 TFLOP/s (TensorFloat-32) need 17 hours, and
4.2 before for the float network.
"""

from ml_collections import ConfigDict

from dr_jax.config import (
  DataConfig,
  DevicesConfig,
  ModelConfig,
  TrainConfig,
  files,
)


def get_config(arg=None):
  """Returns the configuration; see above for what `arg` can be."""
  digits, word = files.parse(arg, "smoke", "torchvision")
  config = ConfigDict()
  config.name = "_".join(filter(None, ("resnet50", digits, word)))
  config.seed = 0
  config.stages = ("pretrain", "multi_precision", "export", "report")
  config.checkpoint_every = 1000
  config.log_every = 100
  config.method = "double_rounding"
  config.data = files.group(
    DataConfig,
    name="tfds",
    dataset="imagenet2012",
    test_split="validation",
    batch_size=256,
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
  config.quant = files.quant_group(map(int, digits or "8642"))
  config.pretrain = files.group(
    TrainConfig,
    epochs=90,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=1e-4,
  )
  config.train = files.train_group(epochs=90, learning_rate=5e-4)
  if word == "torchvision":
    config.model.weights = "resnet50.safetensors"
    config.model.options.preactivation = False
    config.pretrain.epochs = 0  # it is only scored
  return files.smoke(config) if word == "smoke" else config
