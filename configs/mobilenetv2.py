"""Double Rounding of MobileNetV2 on ImageNet, bits {8, 6, 4, 2}.

  python -m dr_jax.main --config=configs/mobilenetv2.py

As configs/resnet18.py in all but the network and the float training: its
docstring says where every number of the joint recipe comes from, how to read a
folder of images, and what ":432", ":torchvision" and ":smoke" do. The file of
":torchvision", mobilenetv2.safetensors, is written from
torchvision.models.mobilenet_v2.

Float training is not stated in the paper; as torchvision's reference: SGD,
learning rate 0.045, momentum 0.9, weight decay 4e-5, batches of 256, 300
epochs; here the learning rate falls as a cosine, not by 2 % an epoch, and there
is no dropout before the head.

Published top-1 accuracy in percent (arXiv 2502.01199, ImageNet; in brackets
its float network; torchvision's IMAGENET1K_V1 has 71.88), not reproduced here:

  bits                      8      6      4      2
  {8, 6, 4, 2} (71.14)  70.98  70.70  68.77  50.43

Time, an estimate and not a measurement: 1.28 M images x 90 epochs x 4
bit-widths x 3 passes x 2 x 0.30 G multiply-accumulates are 8.3e17 operations;
eight A100 at an assumed 5 % of 156 TFLOP/s (depthwise convolutions wait for
memory) need 3.7 hours, and as long before for 300 epochs of the float network.
That is 31,000 images per second of the latter, which 32 cores at an assumed 100
each do not decode: they take 33 hours.
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
  config.name = "_".join(filter(None, ("mobilenetv2", digits, word)))
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
  config.model = files.group(ModelConfig, name="mobilenetv2")
  config.quant = files.quant_group(map(int, digits or "8642"))
  config.pretrain = files.group(
    TrainConfig,
    epochs=300,
    optimizer="sgd",
    learning_rate=0.045,
    weight_decay=4e-5,
  )
  config.train = files.train_group(epochs=90, learning_rate=5e-4)
  if word == "torchvision":
    config.model.weights = "mobilenetv2.safetensors"
    config.pretrain.epochs = 0  # it is only scored
  if word == "smoke":
    files.smoke(config)
    # Depthwise outputs start so small that running variances, from which
    # scales are calibrated, are right only after some 60 steps.
    config.pretrain.epochs = 16
  return config
