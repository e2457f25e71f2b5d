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

import pathlib
import runpy

_BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("resnet18.py")))


def get_config(arg=None):
  """Returns the configuration; `arg` as in configs/resnet18.py."""
  config = _BASE["imagenet_config"]("mobilenetv2", arg, preactivation=None)
  config.pretrain.weight_decay = 4e-5
  if config.data.name == "generated":
    # Depthwise outputs start so small that running variances, from which
    # scales are calibrated, are right only after some 60 steps.
    config.pretrain.epochs = 16
    return config
  config.pretrain.learning_rate = 0.045
  if config.pretrain.epochs:
    config.pretrain.epochs = 300
  return config
