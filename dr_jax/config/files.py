"""What files of configurations share: groups that flags can set, smoke runs.

A flag sets only what its file has: each group here has all of its fields. What
a method brings along is left open, and then the method's own
(`quant.RECIPES`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from dr_jax import quant
from dr_jax.config.fields import DataConfig, QuantConfig, TrainConfig


def group(kind: type, **values: Any) -> ConfigDict:
  """Returns a group with all of its fields.

  Args:
    kind: a dataclass of `dr_jax.config`.
    **values: of the fields that differ from their defaults.
  """
  return ConfigDict(dataclasses.asdict(kind(**values)))


def fashion_mnist(**values: Any) -> ConfigDict:
  """Returns the group `data` of Fashion-MNIST: 60,000 + 10,000 images, 28x28.

  The four idx files are expected in ~/.cache/dr_jax/fashion-mnist, where the
  command in configs/README.md puts them.

  Args:
    **values: of the fields that differ from their defaults.
  """
  return group(
    DataConfig,
    name="idx",
    path="~/.cache/dr_jax/fashion-mnist",
    test_split="t10k",
    **values,
  )


def quant_group(bits: Sequence[int]) -> ConfigDict:
  """Returns the group `quant` with these bits, else left to the method."""
  config = group(QuantConfig, bits=tuple(bits))
  for name in ("weight", "activation", "norm"):
    config[name] = config_dict.placeholder(str)
  for role in ("weight", "activation"):
    options = quant.options_of(role)
    config[f"{role}_options"] = ConfigDict(
      {name: config_dict.placeholder(kind) for name, kind in options.items()}
    )
  return config


def train_group(**values: Any) -> ConfigDict:
  """Returns the group `train`, without what belongs to the method."""
  fields: dict[str, Any] = dataclasses.asdict(TrainConfig(**values))
  for name in {*quant.Recipe._fields, "loss_weights"} & set(fields):
    fields[name] = config_dict.placeholder(type(fields[name]))
  return ConfigDict(fields)


def parse(arg: str | None, *words: str) -> tuple[str, str]:
  """Splits the argument of a file, as "432,smoke": bit-widths and a word.

  Args:
    arg: what follows the colon in --config=FILE.py:ARG, or None.
    words: those that the file knows.

  Returns:
    Digits and word; either is "" where it is missing.

  Raises:
    ValueError: for anything else.

  >>> parse("432,smoke", "smoke"), parse("smoke", "smoke"), parse(None)
  (('432', 'smoke'), ('', 'smoke'), ('', ''))
  """
  given = arg.split(",") if arg else []
  digits = given.pop(0) if given and given[0].isdecimal() else ""
  word = given.pop(0) if given and given[0] in words else ""
  if given:
    more = "".join(f" or {word}, or both as 432,{word}" for word in words)
    raise ValueError(f"argument must be bit-widths, as 432{more}, got {arg!r}")
  return digits, word


def smoke(config: ConfigDict) -> ConfigDict:
  """The same stages and network, on a few images or bytes; in place."""
  if config.data.name == "text":
    config.data.update(bytes=2**12, batch_size=8)
  else:
    _take_synthetic_images(config.data)
  config.pretrain.update(epochs=1, learning_rate=0.01)
  config.train.update(epochs=1, vectorize="sequential")
  config.checkpoint_every = 2
  config.log_every = 1
  if "supernet" in config:
    config.data.holdout = 0.25
    # Any error of the traces will do.
    config.hessian.update(images=8, batch_size=8, max_probes=8, rel_stderr=1e6)
    config.supernet.epochs = 1
  return config


def _take_synthetic_images(data):
  for field in dataclasses.fields(DataConfig):
    _, names = field.metadata.get("only_with", ("", ("synthetic",)))
    if "synthetic" not in names:
      data[field.name] = field.default
  data.update(
    name="synthetic",
    classes=4,
    examples=32,
    channels=3,
    # Smaller ones leave so few pixels to a norm that training diverges.
    image_size=64,
    augment="none",
    batch_size=8,
    workers=0,
  )
