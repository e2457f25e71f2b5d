"""What belongs to each method: quantizers, schedule, losses, curriculum.

A recipe is what a configuration's `method` stands for; any of its fields can
be set there by hand. What methods share (optimizer, learning rate, epochs) is
not part of it, so that a comparison gives all of them the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Phase(NamedTuple):
  """One part of a curriculum.

  Attributes:
    name: for its directory and its messages.
    weight: name of the weight quantizer, or None for the recipe's.
    sampling: as in `train.sampling`, or None for the recipe's.
    norm: kind of batch norm, or None for the recipe's.
  """

  name: str
  weight: str | None = None
  sampling: str | None = None
  norm: str | None = None


class Curriculum(NamedTuple):
  """Phases of training, one after the other.

  Attributes:
    phases: the steps of a run are divided equally among them, each with a
      learning rate that falls to zero; none for a network that is only
      quantized and calibrated.
    recalibrate: whether batch norm statistics of every bit-width are estimated
      anew at the end, because training did not visit it for the whole network.
  """

  phases: tuple[Phase, ...]
  recalibrate: bool = False


CURRICULA: dict[str, Curriculum] = {
  # One phase; its checkpoints lie in the stage's own directory.
  "none": Curriculum((Phase(""),)),
  "post_training": Curriculum((), recalibrate=True),
  # Float weights, then quantized ones, then bit-widths that differ from layer
  # to layer, with a batch norm for each pair of neighbors (ICCV 2021).
  "bit_mixer": Curriculum(
    (
      Phase("float_weights", weight="float_weight", sampling="random"),
      Phase("quantized_weights", sampling="random"),
      Phase("mixed", sampling="mixed", norm="transitional"),
    ),
    recalibrate=True,
  ),
}


class Recipe(NamedTuple):
  """A method's fields of a configuration, `quant.*` and `train.*`.

  Attributes:
    weight, activation: names of `quant.get`; activation "none" for float.
    weight_options, activation_options: their keyword arguments.
    norm: as in `nn.quantize`.
    schedule, sampling, distillation, alrs: as in `make_step`.
    lowest_loss_weight: the lowest bit-width's share of the loss where the
      others have 0.1 each (MatQuant); None for equal shares.
    curriculum: a name of CURRICULA.
  """

  weight: str
  activation: str = "lsq_activation"
  weight_options: dict[str, Any] = {}
  activation_options: dict[str, Any] = {}
  norm: str = "switchable"
  schedule: str = "alternate"
  sampling: str = "all"
  distillation: str = "none"
  alrs: str = "none"
  lowest_loss_weight: float | None = None
  curriculum: str = "none"

  def loss_weights(self, bits: tuple[int, ...]) -> tuple[float, ...]:
    """One factor per bit-width, or none."""
    if self.lowest_loss_weight is None or len(bits) == 1:
      return ()
    return (0.1,) * (len(bits) - 1) + (self.lowest_loss_weight,)


RECIPES: dict[str, Recipe] = {
  "double_rounding": Recipe("double_rounding", alrs="eta"),
  "double_rounding_unshared": Recipe(
    "double_rounding", weight_options={"shared": False}, alrs="eta"
  ),
  "lsq": Recipe("lsq"),
  "lsq_plus": Recipe("lsq_plus", "lsq_plus_activation"),
  "adabits": Recipe(
    "adabits",
    "pact_activation",
    weight_options={"scheme": "modified", "rescale": True},
    schedule="accumulate",
  ),
  "adabits_centered": Recipe(
    "adabits",
    "pact_activation",
    weight_options={"scheme": "centered", "rescale": True},
    schedule="accumulate",
  ),
  "adabits_original": Recipe(
    "adabits",
    "pact_activation",
    weight_options={"scheme": "original", "rescale": True},
    schedule="accumulate",
  ),
  "any_precision": Recipe(
    "any_precision",
    "unit_activation",
    schedule="accumulate",
    distillation="recursive",
  ),
  "bit_mixer": Recipe("bit_mixer", curriculum="bit_mixer"),
  "multiquant": Recipe(
    "lsq",
    schedule="accumulate",
    sampling="sandwich",
    distillation="online_label_class_means",
  ),
  "multiquant_highest": Recipe(
    "lsq",
    schedule="accumulate",
    sampling="sandwich",
    distillation="online_label_highest",
  ),
  "term_quantization": Recipe(
    "term_quantization", "term_activation", curriculum="post_training"
  ),
  "multi_resolution": Recipe(
    "multi_resolution",
    "multi_resolution_activation",
    schedule="accumulate",
    sampling="pair",
    distillation="resolution",
  ),
  "bitwave": Recipe("bitwave", curriculum="post_training"),
  "truncquant": Recipe("truncation", weight_options={"scheme": "truncquant"}),
  "matquant": Recipe(
    "truncation",
    weight_options={"scheme": "matquant"},
    schedule="accumulate",
    lowest_loss_weight=1.0,
  ),
  "binary": Recipe("binary", "none"),
  "ternary": Recipe("ternary"),
}
