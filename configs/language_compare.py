"""Nested language models: MatQuant's observations, checked on bytes of text.

  python -m dr_jax.main --config=configs/language_compare.py [--workdir=DIR]
  python -m dr_jax.main --config=configs/language_compare.py:matquant,alone

The network of configs/language.py:small on the first 2^20 bytes; weights are
quantized and inputs stay float, as in arXiv 2502.06786 (MatQuant), which says
of language models of 2 to 9 billion parameters:

  the 2-bit model inside a nested one is better than one trained alone;
  models of 6 and 3 bits, for which nothing was trained, come for free: they are
  about as good as ones trained for them;
  co-distillation, where lower bit-widths learn from the highest, helps the
  lowest.

Rows named "alone" train one network per bit-width. The others train at 8, 4 and
2 bits together; their 6 and 3 bits have loss weight 0, so that the columns show
what comes for free. All start from the same float network, see the same batches
and share the optimizer; a network of several bit-widths takes one update a
batch ("accumulate"), as those alone do. "alternate" is Double Rounding as
published, with an update for every bit-width. The last rows quantize inputs
too.
"""

from ml_collections import ConfigDict

from dr_jax.config import (
  DataConfig,
  DevicesConfig,
  ModelConfig,
  TrainConfig,
  files,
)

NESTED = (8, 6, 4, 3, 2)
# Of the losses: MatQuant's for the trained bit-widths, and equal ones.
_MATQUANT = (0.1, 0.0, 0.1, 0.0, 1.0)
_EQUAL = (1.0, 0.0, 1.0, 0.0, 1.0)


def _nested(method, weights, **changes):
  """An entry of all bit-widths, trained at three of them."""
  train = {"loss_weights": weights, "schedule": "accumulate"}
  quant = {"bits": NESTED, "activation": "none"}
  return {
    "method": method,
    "quant": quant | changes.pop("quant", {}),
    "train": train | changes,
  }


def _alone(method, bits):
  return {
    "method": method,
    "row": f"{method.replace('_', ' ')} alone",
    "quant": {"bits": (bits,), "activation": "none"},
    "train": {},
  }


_ENTRIES = {
  "matquant": _nested("matquant", _MATQUANT),
  "matquant codistilled": _nested(
    "matquant", _MATQUANT, distillation="online_label_highest"
  ),
  **{f"matquant_alone_{b}": _alone("matquant", b) for b in NESTED},
  "double rounding": _nested("double_rounding", _EQUAL),
  "double rounding alternate": {
    "method": "double_rounding",
    "quant": {"bits": (8, 4, 2), "activation": "none"},
    "train": {},
  },
  "lsq": _nested("lsq", _EQUAL),
  "lsq_alone_2": _alone("lsq", 2),
  "double rounding inputs": {
    "method": "double_rounding",
    "quant": {"bits": (8, 4, 2)},
    "train": {},
  },
  "lsq inputs": {
    "method": "lsq",
    "quant": {"bits": (8, 4, 2)},
    "train": {},
  },
}
# Names of the argument, each one or several entries.
GROUPS = {
  "matquant": ("matquant", "matquant codistilled"),
  "alone": tuple(f"matquant_alone_{b}" for b in NESTED),
  "double_rounding": ("double rounding", "double rounding alternate"),
  "lsq": ("lsq", "lsq_alone_2"),
  "inputs": ("double rounding inputs", "lsq inputs"),
}


def get_config(arg=None):
  """Returns the comparison; the argument names groups, by default all."""
  chosen = arg.split(",") if arg else list(GROUPS)
  for name in chosen:
    if name not in GROUPS:
      known = ", ".join(GROUPS)
      raise ValueError(f"methods must be of {known}, got {name!r}")
  config = ConfigDict()
  config.name = "language_compare"
  config.seeds = (0, 1, 2)
  config.checkpoint_every = 1000
  config.log_every = 20
  config.data = files.group(
    DataConfig, name="text", length=64, batch_size=64, bytes=2**20
  )
  config.devices = files.group(DevicesConfig)
  config.model = files.group(
    ModelConfig,
    name="transformer",
    options={"width": 64, "depth": 2, "heads": 4, "kv_heads": 2},
  )
  config.quant = ConfigDict({"bits": NESTED})
  config.pretrain = files.group(
    TrainConfig,
    epochs=6,
    optimizer="adamw",
    learning_rate=4e-3,
    warmup=0.05,
    weight_decay=0.1,
  )
  config.train = files.train_group(
    epochs=1, learning_rate=1e-3, warmup=0.05, vectorize="sequential"
  )
  config.methods = ConfigDict(
    {entry: _ENTRIES[entry] for name in chosen for entry in GROUPS[name]}
  )
  return config
