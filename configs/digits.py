"""Double Rounding on scikit-learn's handwritten digits, bits {8, 6, 4, 2}.

  python -m dr_jax.main --config=configs/digits.py

1,797 real 8x8 images, which come with scikit-learn; stratified 70/30 split. A
pre-activation ResNet8 of 0.38 M parameters: float training, joint training at
four bit-widths, and one integer artifact that serves them all.

`--config.method=adabits` (any of quant.RECIPES) trains another method instead.
Add the stage "separate" to train LSQ at each bit-width for comparison;
`python -m dr_jax.benchmarks.digits` gives means over seeds. Recipe after arXiv
2502.01199, section 4 (Adam, cosine, weight decay 5e-5), with a larger learning
rate and fewer epochs.
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
  """Returns the configuration; "432" as argument takes bits {4, 3, 2}."""
  digits, _ = files.parse(arg)
  config = ConfigDict()
  config.name = f"digits_{digits}" if digits else "digits"
  config.seed = 0
  config.stages = ("pretrain", "multi_precision", "export", "report")
  config.checkpoint_every = 50
  config.log_every = 10
  config.method = "double_rounding"
  config.data = files.group(DataConfig, name="digits", batch_size=128)
  config.devices = files.group(DevicesConfig)
  config.model = files.group(
    ModelConfig, name="resnet", options={"depth": 8, "widths": (16, 64, 160)}
  )
  # What is left open here is the method's own; see quant.RECIPES.
  config.quant = files.quant_group(map(int, digits or "8642"))
  config.pretrain = files.group(
    TrainConfig, epochs=15, optimizer="sgd", learning_rate=0.1
  )
  config.train = files.train_group(epochs=15, learning_rate=1e-3)
  return config
