"""Curricula: phases of training that follow each other.

  none           one phase
  bit_mixer      float weights, quantized ones, then bits per layer (ICCV 2021)
  post_training  no phase: the network is quantized and calibrated

What else belongs to a method is its recipe, `quant.RECIPES`.
"""

from __future__ import annotations

from typing import NamedTuple


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
    recalibrate: whether batch norm statistics of every bit-width are
      re-estimated at the end, because no pass of training was at that bit-width
      for the whole network.
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
