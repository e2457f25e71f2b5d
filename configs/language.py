"""Double Rounding of a small language model on bytes of text, bits {8, 4, 2}.

  python -m dr_jax.main --config=configs/language.py

A decoder-only transformer of 0.8 M parameters (four blocks of width 128, four
heads that share two of keys and values, SwiGLU) predicts the next byte of
Python's own documentation, which needs no download: the language reference and
the docstrings of the standard library, 2.0 MB for training and 0.2 MB, other
documents, for testing (see dr_jax/data/README.md). Float training, joint
training at three bit-widths, and one integer artifact; tables show bits per
byte, in sequences of 128 bytes. Text comes out of the artifact with

  python -m dr_jax.generate --artifact=runs/language/export/model --bits=4
    --prompt="Return the"

  language.py:842          bits {8, 4, 2}; any digits
  language.py:weights      the layers' inputs stay float
  language.py:small        width 64, two blocks, sequences of 64 bytes
  language.py:smoke        a few steps on 4,096 bytes, on any machine

A text of your own: --config.data.path=DIR, with .txt files in DIR/train/ and
DIR/test/. Any method of quant.RECIPES: --config.method=matquant, whose
co-distillation is --config.train.distillation=online_label_highest (labels and
the highest bit-width's softmax, in equal parts) or =highest (that alone).

Recipe: ours, not tuned. AdamW with a warm-up and weight decay 0.1, as language
models are trained (arXiv 2302.13971, section 2.3), at learning rate 2e-3; then
Adam, learning rate 5e-4, weight decay 5e-5, as arXiv 2502.01199. The first and
the last layer stay float, as there.

Time, an estimate and not a measurement: 6 x 0.8 M operations per byte and pass,
2.0 MB x (4 epochs + 2 epochs x 3 bit-widths) are 1.0e14 operations; two cores
at 50 GFLOP/s need 30 minutes, `small` a tenth of that.
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
  digits, word = files.parse(arg, "smoke", "weights", "small")
  config = ConfigDict()
  config.name = "_".join(filter(None, ("language", digits, word)))
  config.seed = 0
  config.stages = ("pretrain", "multi_precision", "export", "report")
  config.checkpoint_every = 200
  config.log_every = 20
  config.method = "double_rounding"
  config.data = files.group(DataConfig, name="text", length=128, batch_size=32)
  config.devices = files.group(DevicesConfig)
  config.model = files.group(
    ModelConfig,
    name="transformer",
    options={"width": 128, "depth": 4, "heads": 4, "kv_heads": 2},
  )
  config.quant = files.quant_group(map(int, digits or "842"))
  config.pretrain = files.group(
    TrainConfig,
    epochs=4,
    optimizer="adamw",
    learning_rate=2e-3,
    warmup=0.05,
    weight_decay=0.1,
  )
  config.train = files.train_group(epochs=2, learning_rate=5e-4, warmup=0.05)
  if word == "weights":
    config.quant.activation = "none"
  if word == "small":
    config.data.update(length=64, batch_size=64)
    config.model.options.update(width=64, depth=2)
    config.pretrain.update(epochs=2, learning_rate=4e-3)
    config.train.update(epochs=1, learning_rate=1e-3)
  return files.smoke(config) if word == "smoke" else config
