"""Mixed precision of ResNet50 on ImageNet, bits {4, 3, 2}, 3 on average.

  python -m dr_jax.main --config=configs/resnet50_mixed.py

As configs/resnet18_mixed.py in all but the network: its docstring says where
every number of the recipe comes from, and what ":8642" and ":smoke" do.

Published top-1 accuracy in percent (arXiv 2502.01199, ImageNet), none of it
reproduced here: 75.06 at 3 bits on average, 75.24 with distillation.

Time, an estimate and not a measurement, from the operations in
configs/resnet50.py on eight A100: 4.2 hours of float training, 12.6 of joint
training (three bit-widths), 12.6 of the SuperNet; the traces, at most 512
products of about two gradients of 1,024 images each, below an hour.
"""

import pathlib
import runpy

_BASE = runpy.run_path(
  str(pathlib.Path(__file__).with_name("resnet18_mixed.py"))
)


def get_config(arg=None):
  """Returns the configuration; `arg` as in configs/resnet18_mixed.py."""
  return _BASE["mixed_config"]("resnet50", arg)
