"""Tasks: which number says how well a network does.

Every task is to choose a class for each label of an example, one of an image,
one of every byte of a text. Loss and scores are the same functions for all:
mean cross-entropy in nats ("loss"), and the percentage of labels for which the
right class has the largest logit ("accuracy"). A task says what is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Task(NamedTuple):
  """How the scores of a task are shown.

  Attributes:
    metric: its name and unit, as a heading.
    score: what it is computed from, "accuracy" or "loss".
    factor: the metric is this many times the score.
    digits: decimals.
    higher_is_better: whether more of it is better.
    range: a network that is further from the float one has failed; figures
      leave it out.
  """

  metric: str
  score: str
  factor: float
  digits: int
  higher_is_better: bool
  range: float

  def value(self, scores: Mapping[str, float]) -> float:
    """The metric of {"accuracy", "loss"}, or of standard deviations of both.

    >>> round(TASKS["language"].value({"accuracy": 50.0, "loss": 1.386}), 3)
    2.0
    """
    return self.factor * scores[self.score]

  def cost(self, scores: Mapping[str, float]) -> float:
    """The metric, or its negative, such that less is better."""
    return self.value(scores) * (-1 if self.higher_is_better else 1)

  def shown(self, scores: Mapping[str, float]) -> str:
    """The metric as text, without its name."""
    return f"{self.value(scores):.{self.digits}f}"


TASKS = {
  "classification": Task("accuracy %", "accuracy", 1.0, 2, True, 10.0),
  "language": Task("bits per byte", "loss", 1 / math.log(2), 4, False, 1.5),
}
