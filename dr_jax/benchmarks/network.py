"""A named network and its training step, on the devices of a layout.

What `joint_step --model` and `scaling` measure: Double Rounding with one batch
norm per bit-width, SGD, random images.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from dr_jax import deploy, models, nn, quant, train
from dr_jax.config import TrainConfig
from dr_jax.runtime.sharding import Layout

# The smallest of the CIFAR networks has no name.
_DEPTH8 = "resnet8"
NAMES = (_DEPTH8, *(name for name in models.NAMES if name != "resnet"))
# The others are networks for 32x32 images of 10 classes.
_IMAGENET = ("resnet18", "resnet34", "resnet50", "mobilenetv2")
# Calibration needs no more, and compiles another program.
_SAMPLE = 2


class Setting(NamedTuple):
  """What is trained on what.

  Attributes:
    model: one of `NAMES`.
    image_size: height and width of an image; 0 for the network's own.
    dtype: of the computation, "float32" or "bfloat16".
    bits: candidate bit-widths, highest first.
  """

  model: str
  image_size: int = 0
  dtype: str = "float32"
  bits: tuple[int, ...] = (8, 6, 4, 2)

  @property
  def size(self) -> int:
    """Height and width of an image, in pixels."""
    return self.image_size or (224 if self.model in _IMAGENET else 32)

  @property
  def classes(self) -> int:
    """Width of the logits."""
    return 1000 if self.model in _IMAGENET else 10

  def batch(self, count: int) -> dict[str, np.ndarray]:
    """Random images [count, size, size, 3] and labels [count]."""
    shape = (count, self.size, self.size, 3)
    image = np.random.default_rng(0).standard_normal(shape, np.float32)
    labels = (np.arange(count) % self.classes).astype(np.int32)
    return {"image": image, "label": labels}

  def floating(self) -> nnx.Module:
    """The float network, untrained."""
    small = self.model == _DEPTH8
    return models.build(
      "resnet" if small else self.model,
      **({"depth": 8} if small else {}),
      rngs=nnx.Rngs(0),
      num_classes=self.classes,
      dtype=self.dtype,
    )

  def quantized(self) -> nnx.Module:
    """The network at several bit-widths; first and last layer are float."""
    return nn.quantize(
      self.floating(),
      weight=quant.double_rounding(self.bits),
      activation=quant.lsq_activation(self.bits),
      sample=self.batch(_SAMPLE)["image"],
    )

  def save(self, path: pathlib.Path) -> pathlib.Path:
    """Writes its artifact, with codes that nest; load it with `floating()`."""
    network = nn.quantize(
      self.floating(),
      weight=quant.double_rounding(self.bits, rounding="half_up"),
      activation=quant.lsq_activation(self.bits),
      # Sizes and times do not depend on statistics.
      sample=self._replace(image_size=32).batch(1)["image"],
    )
    deploy.save(path, network)
    return path

  def macs(self) -> int:
    """Multiply-accumulates of all layers, float ones too, for one image."""
    table = nn.layer_table(
      nn.quantize(
        self.floating(),
        weight=quant.double_rounding(self.bits),
        sample=self.batch(1)["image"],
        skip=(),
      )
    )
    return sum(row.macs for row in table)


def bit_widths(texts: Sequence[str]) -> tuple[int, ...]:
  """Returns the candidate bit-widths of a flag.

  Raises:
    ValueError: for what is not an integer, or not a list of candidates.

  >>> bit_widths(["8", "2"])
  (8, 2)
  """
  for text in texts:
    if not text.isdecimal():
      raise ValueError(f"bits must be integers, got {text!r}")
  return quant.check_bits(list(map(int, texts)))


def trainer(
  model: nnx.Module,
  recipe: TrainConfig,
  layout: Layout | None = None,
) -> tuple[train.Trainer, train.TrainState]:
  """Returns the trainer of a network, and its first state.

  Args:
    model: float or quantized; left unchanged.
    recipe: how a step is made; the optimizer is SGD.
    layout: where states and batches live; None leaves it to JAX.
  """
  network = nn.functional(model)
  optimizer = train.make_optimizer(
    "sgd", param_labels=network.param_labels, weight_decay=5e-5
  )
  made = train.make_trainer(
    network,
    optimizer,
    optax.constant_schedule(1e-4),
    schedule=recipe.schedule,
    vectorize=recipe.vectorize,
    alrs=recipe.alrs,
    sampling=recipe.sampling,
    distillation=recipe.distillation,
    loss_weights=recipe.loss_weights,
    layout=layout,
    num_classes=model.head.out_features,  # pyrefly: ignore
  )
  return made, made.init(jax.random.key(0))
