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

import pathlib
import runpy

_BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("resnet18.py")))


def get_config(arg=None):
  """Returns the configuration; `arg` as in configs/resnet18.py."""
  return _BASE["imagenet_config"]("resnet50", arg)
