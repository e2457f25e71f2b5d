"""Double Rounding of a vision transformer, bits {8, 6, 4, 2}.

  python -m dr_jax.main --config=configs/vit.py
  python -m dr_jax.main --config=configs/vit.py:fashion

The first trains ViT-Ti/16 (5.7 M parameters) on ImageNet through TFDS; for a
folder that holds one directory per class in train/ and val/ add
--config.data.name=folder --config.data.path=DIR --config.data.dataset=
--config.data.test_split=val. ViT-S/16 is --config.model.name=vit_small.

  vit.py:fashion  a ViT of four blocks of width 64 and patches of 4 x 4 pixels
                  on Fashion-MNIST (configs/README.md: where the files go)
  vit.py:432      bits {4, 3, 2}
  vit.py:smoke    a few steps on synthetic images, on any machine

Recipe of the float network, arXiv 2012.12877 (DeiT), table 9: AdamW, learning
rate 5e-4 x batch / 512, batches of 1024, weight decay 0.05, 300 epochs, 5 of
them warm-up, cosine. Not here: RandAugment, Mixup, CutMix, random erasing,
label smoothing, stochastic depth and repeated augmentation, so that accuracy
will be points below what is published; augmentation is random resized crop and
flip. Joint training as arXiv 2502.01199, section 4,
which has no transformers: Adam, learning rate 5e-4, weight decay 5e-5, 90
epochs, cosine.

Published top-1 accuracy in percent of the float networks (arXiv 2012.12877),
none of it reproduced here: DeiT-Ti 72.2, DeiT-S 79.8.

Time, an estimate and not a measurement: 1.28 M images x (300 epochs + 90 epochs
x 4 bit-widths) x 3 passes (a backward pass counts as two) x 2 x 1.3 G
multiply-accumulates are 6.6e18 operations; eight A100 at an assumed 15 % of 156
TFLOP/s (TensorFloat-32) need 10 hours. Fashion-MNIST: 60,000 images x (6 + 2 x
4) x 3 x 2 x 11 M are 5.5e13 operations, half an hour on two cores at 30
GFLOP/s.
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
  digits, word = files.parse(arg, "smoke", "fashion")
  config = ConfigDict()
  config.name = "_".join(filter(None, ("vit", digits, word)))
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
    batch_size=1024,
    augment="random_resized_crop",
    image_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    workers=32,
  )
  config.devices = files.group(DevicesConfig)
  config.model = files.group(ModelConfig, name="vit_tiny")
  config.quant = files.quant_group(map(int, digits or "8642"))
  config.pretrain = files.group(
    TrainConfig,
    epochs=300,
    optimizer="adamw",
    learning_rate=1e-3,
    warmup=5 / 300,
    weight_decay=0.05,
  )
  config.train = files.train_group(epochs=90, learning_rate=5e-4)
  if word == "fashion":
    config.data = files.fashion_mnist(batch_size=128)
    config.model = files.group(
      ModelConfig,
      name="vit",
      options={"depth": 4, "width": 64, "heads": 4, "patch_size": 4},
    )
    config.pretrain.update(epochs=6, warmup=0.05)
    config.train.epochs = 2
  return files.smoke(config) if word == "smoke" else config
