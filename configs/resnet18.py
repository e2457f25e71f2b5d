"""Double Rounding of ResNet18 on ImageNet, bits {8, 6, 4, 2}.

  python -m dr_jax.main --config=configs/resnet18.py

Float training, joint training at four bit-widths, and one integer artifact.
ImageNet is read through TFDS (`data.dataset`); for a folder that holds one
directory per class in train/ and val/ add --config.data.name=folder
--config.data.path=DIR --config.data.test_split=val.

  resnet18.py:432          bits {4, 3, 2}
  resnet18.py:torchvision  starts from torchvision's float weights
  resnet18.py:smoke        a few steps on generated images, on any machine

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

import pathlib
import runpy

import ml_collections

_DIGITS = runpy.run_path(str(pathlib.Path(__file__).with_name("digits.py")))
_WORDS = ("smoke", "torchvision")


def get_config(arg=None):
  """Returns the configuration; see above for what `arg` can be."""
  return imagenet_config("resnet18", arg)


def imagenet_config(model, arg, *, bits="8642", preactivation=True):
  """Returns a configuration for a network on ImageNet.

  Args:
    model: a name of `models.build`.
    arg: None, bit-widths as "432", "smoke", "torchvision", or bit-widths and a
      word, as "432,smoke".
    bits: bit-widths where `arg` has none.
    preactivation: option of the model, None for a model without it.
  """
  digits, word = _parsed(arg)
  # Its group `quant`, and what `train` leaves to the method.
  config = _DIGITS["get_config"](digits or bits)
  config.name = "_".join(filter(None, (model, digits, word)))
  config.checkpoint_every = 1000
  config.log_every = 100

  config.data = ml_collections.ConfigDict()
  config.data.name = "tfds"
  config.data.dataset = "imagenet2012"
  config.data.path = ""
  config.data.train_split = "train"
  config.data.test_split = "validation"
  config.data.batch_size = 256
  config.data.holdout = 0.0
  config.data.augment = "random_resized_crop"
  config.data.image_size = 224
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  config.data.workers = 32
  config.data.on_decode_error = "raise"

  config.model = ml_collections.ConfigDict()
  config.model.name = model
  config.model.weights = ""
  config.model.dtype = "float32"
  config.model.options = ml_collections.ConfigDict()
  if preactivation is not None:
    config.model.options.preactivation = preactivation

  config.pretrain.epochs = 90
  config.pretrain.optimizer = "sgd"
  config.pretrain.learning_rate = 0.1
  config.pretrain.weight_decay = 1e-4
  config.pretrain.momentum = 0.9

  config.train.epochs = 90
  config.train.optimizer = "adam"
  config.train.learning_rate = 5e-4
  config.train.weight_decay = 5e-5
  if word == "torchvision":
    config.model.weights = f"{model}.safetensors"
    config.pretrain.epochs = 0  # it is only scored
    if preactivation is not None:
      config.model.options.preactivation = False
  return smoke(config) if word == "smoke" else config


def smoke(config):
  """The same stages and network, on a few generated images."""
  config.data.name = "generated"
  config.data.classes = 4
  config.data.examples = 32
  config.data.channels = 3
  # Smaller ones leave so few pixels to a norm that training diverges.
  config.data.image_size = 64
  config.data.augment = "none"
  config.data.batch_size = 8
  config.data.workers = 0
  config.pretrain.epochs = 1
  config.pretrain.learning_rate = 0.01
  config.train.epochs = 1
  config.train.vectorize = "sequential"
  config.checkpoint_every = 2
  config.log_every = 1
  return config


def _parsed(arg):
  """("432", "smoke") of "432,smoke"; either can be missing."""
  words = arg.split(",") if arg else []
  digits = words.pop(0) if words and words[0].isdecimal() else ""
  word = words.pop(0) if words and words[0] in _WORDS else ""
  if words:
    raise ValueError(
      f"argument must be bit-widths, as 432, {' or '.join(_WORDS)}, or both, "
      f"as 432,smoke, got {arg!r}"
    )
  return digits, word
