"""Double Rounding of ResNet20 on CIFAR-10, bits {8, 6, 4, 2}.

  python -m dr_jax.main --config=configs/resnet20_cifar10.py

Float training, joint training at four bit-widths, and one integer artifact.
CIFAR-10 is read through TFDS (`data.dataset`).

  resnet20_cifar10.py:432    bits {4, 3, 2}
  resnet20_cifar10.py:smoke  a few steps on synthetic images, on any machine

Recipe, arXiv 2502.01199, section 4: pre-activation ResNet20, started from the
float one; Adam, learning rate 5e-4, weight decay 5e-5 and none on scales,
batches of 128, 200 epochs, cosine without warm-up; first and last layer float;
one batch norm per bit-width. What the paper does not state:

  float training  as arXiv 1512.03385, section 4.2: SGD, learning rate 0.1,
                  momentum 0.9, weight decay 1e-4, batches of 128; 200 epochs
                  and a cosine in place of 64,000 steps and two drops
  augmentation    as there: pad by 4, crop at random, flip
  ALRS            "eta", the method's own; --config.train.alrs=paper for the
                  formula as printed

Published top-1 accuracy in percent (arXiv 2502.01199; in brackets its float
network), none of it reproduced here:

  bits                      8      6      4      3      2
  {8, 6, 4, 2} (92.30)  92.25  92.32  92.09         90.19
  without ALRS          92.17  92.20  92.17         89.67
  {4, 3, 2}                           91.79  91.83  88.88

Time, an estimate and not a measurement: 200 epochs are 78,000 joint steps. At
the 1.82 s that a joint step takes on two CPU cores ("Steps" in
dr_jax/benchmarks/README.md) they are 39 hours, and the float network takes 11
before. 9.8e15 operations (50,000 images x 200 x 4 bit-widths x 3 passes x 2 x
41 M multiply-accumulates) at an assumed 5 % of an A100's 156 TFLOP/s
(TensorFloat-32) are 21 minutes.
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
  digits, word = files.parse(arg, "smoke")
  config = ConfigDict()
  config.name = "_".join(filter(None, ("resnet20_cifar10", digits, word)))
  config.seed = 0
  config.stages = ("pretrain", "multi_precision", "export", "report")
  config.checkpoint_every = 1000
  config.log_every = 100
  config.method = "double_rounding"
  config.data = files.group(
    DataConfig,
    name="tfds",
    dataset="cifar10",
    batch_size=128,
    augment="pad_and_crop",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  )
  config.devices = files.group(DevicesConfig)
  config.model = files.group(ModelConfig, name="resnet20")
  config.quant = files.quant_group(map(int, digits or "8642"))
  config.pretrain = files.group(
    TrainConfig,
    epochs=200,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=1e-4,
  )
  config.train = files.train_group(epochs=200, learning_rate=5e-4)
  if word == "smoke":
    files.smoke(config)
    config.data.image_size = 32
  return config
