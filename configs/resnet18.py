"""Double Rounding of ResNet18 on ImageNet, bits {8, 6, 4, 2}.

  python -m dr_jax.main --config=configs/resnet18.py

Float training, joint training at four bit-widths, and one integer artifact.
ImageNet is read through TFDS (`data.dataset`); for a folder that holds one
directory per class in train/ and val/ add --config.data.name=folder
--config.data.path=DIR --config.data.dataset= --config.data.test_split=val.

  resnet18.py:432          bits {4, 3, 2}
  resnet18.py:torchvision  starts from torchvision's float weights
  resnet18.py:smoke        a few steps on synthetic images, on any machine

The file of float weights that ":torchvision" reads, resnet18.safetensors or
another one named with --config.model.weights, is written by

  python -c "import torchvision as t, safetensors.torch as s; s.save_file(
    t.models.resnet18(weights='IMAGENET1K_V1').state_dict(),
    'resnet18.safetensors')"

Recipe, arXiv 2502.01199, section 4: pre-activation network, started from the
float one; Adam, learning rate 5e-4, weight decay 5e-5 and none on scales,
batches of 256, 90 epochs, cosine without warm-up; first and last layer float;
one batch norm per bit-width. What the paper does not state:

  float training  as torchvision's reference and arXiv 1512.03385, section 3.4:
                  SGD, learning rate 0.1, momentum 0.9, weight decay 1e-4, 90
                  epochs; the learning rate falls as a cosine, not in steps
  augmentation    random resized crop to 224 and flip; center crop in the test
  ALRS            "eta", the method's own; --config.train.alrs=paper for the
                  formula as printed
  float weights   the paper's float accuracy is, to the digit, that of
                  torchvision's IMAGENET1K_V1, a post-activation network; it
                  does not say how the two go together

Published top-1 accuracy in percent (same paper, ImageNet; in brackets its
float network), none of it reproduced here:

  bits                      8      6      4      3      2
  {8, 6, 4, 2} (69.76)  70.74  70.71  70.43         66.35
  with distillation     70.87  70.79  70.53         66.84
  {4, 3, 2}                           69.73  69.20  66.30
  separate LSQ (70.5)    71.1          71.1          67.6

Distillation is --config.train.distillation=progressive; --config.stages with
"separate" adds LSQ at each bit-width.

Time, an estimate and not a measurement: 1.28 M images x 90 epochs x 4
bit-widths x 3 passes (a backward pass counts as two) x 2 x 1.81 G
multiply-accumulates are 5.0e18 operations; eight A100 at an assumed 15 % of
156 TFLOP/s (TensorFloat-32) need 7.5 hours, and 1.9 before for the float
network. At an assumed 100 decoded images per second and core, 32 cores feed it.
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
  config.name = "_".join(filter(None, ("resnet18", digits, word)))
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
    ModelConfig, name="resnet18", options={"preactivation": True}
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
    config.model.weights = "resnet18.safetensors"
    config.model.options.preactivation = False
    config.pretrain.epochs = 0  # it is only scored
  return files.smoke(config) if word == "smoke" else config
