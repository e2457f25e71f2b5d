"""What each bit-width learns from: labels, or logits of a higher one.

With p_j the softmax at pass j of a step (0 the highest bit-width), y the
one-hot labels, CE(target, p) = -sum target log p, and teachers detached, each
the mean over all labels: one of an image, one of every byte of a text.

  none        CE(y, p_j)
  recursive   CE(y, p_0); CE(p_{j-1}, p_j)      Any-Precision, AAAI 2021
  highest     CE(y, p_0); CE(p_0, p_j)
  progressive CE(y, p_0); CE((1 - a) y + a p_0, p_j), a = 0.7 (t + 1) / T
              progressive self-distillation, the "KD" rows of arXiv 2502.01199
  resolution  0.45 CE(y, p_0); 0.45 CE(y, p_j) + 0.1 T^2 KL(p_0 || p_j) at
              temperature T = 4                   multi-resolution, ASPLOS 2021
  online_label_highest      CE(y, p_0); CE((y + p_0) / 2, p_j)
  online_label_class_means  CE((y + m_y) / 2, p_j), m_c the running mean of the
              softmax of samples of class c that the highest bit-width got right

The last two are two readings of MultiQuant's online adaptive label (IJCAI
2022), whose details are not public: the equal weights, the momentum 0.9 of the
means and their start at the one-hot labels are ours, and no parity is claimed.
For "progressive" the paper speaks of stored predictions of the highest
bit-width; here they are those of the same step, and t counts steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_TEMPERATURE = 4.0
_MOMENTUM = 0.9

Pass = int | jax.Array


class Distillation(NamedTuple):
  """One scheme.

  Attributes:
    teacher: whose logits a pass is given: "previous", "first", or None.
    loss: `loss(logits, labels, teacher, number, progress, memory) -> scalar`.
      logits and teacher [..., classes], labels int [...], `number` the number
      of the pass in the step (int, or traced int32), `progress` in (0, 1] how
      much of the run is done. At pass 0 the teacher means nothing.
    init: `init(classes) -> memory`, what is carried from step to step.
    learn: `learn(memory, logits, labels) -> memory` from the first pass's
      logits, before any loss of the step.
  """

  teacher: str | None
  loss: Callable[..., jax.Array]
  init: Callable[[int], Any] = lambda classes: {}
  learn: Callable[..., Any] = lambda memory, logits, labels: memory

  @property
  def exchanges(self) -> bool:
    """Whether a pass needs the logits of others."""
    return self.teacher is not None or bool(self.init(1))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the mean cross-entropy in nats, float32 scalar.

  There is no label to ignore: leave the example out, or give it mask 0 where
  `make_evaluate` scores.

  Args:
    logits: [..., classes], any float dtype.
    labels: int [...]; the result is NaN if one is not a class.

  >>> logits = jnp.array([[0.0, 0.0], [10.0, 0.0]])
  >>> round(float(cross_entropy(logits, jnp.array([1, 0]))), 4)
  0.3466
  """
  return cross_entropies(logits, labels).mean()


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross-entropy of each label, float32 [...]; see `cross_entropy`."""
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )
  return jnp.where(_is_class(labels, logits.shape[-1]), losses, jnp.nan)


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean cross-entropy against probabilities [..., classes]; float32."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -(targets * log_p).sum(-1).mean()


def _none(logits, labels, teacher, number, progress, memory):
  del teacher, number, progress, memory
  return cross_entropy(logits, labels)


def _soft(logits, labels, teacher, number, progress, memory):
  del progress, memory
  return _after_the_first(
    number,
    lambda: cross_entropy(logits, labels),
    lambda: soft_cross_entropy(logits, jax.nn.softmax(teacher)),
  )


def _mixture(fraction):
  def loss(logits, labels, teacher, number, progress, memory):
    del memory
    part = fraction(progress)
    hard = _one_hot(labels, logits.shape[-1])
    return _after_the_first(
      number,
      lambda: cross_entropy(logits, labels),
      lambda: soft_cross_entropy(
        logits, (1 - part) * hard + part * jax.nn.softmax(teacher)
      ),
    )

  return loss


def _resolution(logits, labels, teacher, number, progress, memory):
  del progress, memory
  hard = 0.45 * cross_entropy(logits, labels)

  def with_teacher():
    t = _TEMPERATURE
    theirs = jax.nn.log_softmax(teacher / t)
    ours = jax.nn.log_softmax(logits.astype(jnp.float32) / t)
    divergence = (jnp.exp(theirs) * (theirs - ours)).sum(-1).mean()
    return hard + 0.1 * t * t * divergence

  return _after_the_first(number, lambda: hard, with_teacher)


def _class_means(logits, labels, teacher, number, progress, memory):
  del teacher, number, progress
  hard = _one_hot(labels, logits.shape[-1])
  return soft_cross_entropy(logits, (hard + memory["means"][labels]) / 2)


def _learn_class_means(memory, logits, labels):
  labels = labels.reshape(-1)
  logits = logits.reshape(len(labels), -1).astype(jnp.float32)
  p = jax.nn.softmax(logits)
  hard = jax.nn.one_hot(labels, p.shape[-1])
  right = hard * (p.argmax(-1) == labels).astype(jnp.float32)[:, None]
  count = right.sum(0)[:, None]  # of each class
  seen = (right.T @ p) / jnp.maximum(count, 1)
  means = memory["means"]
  moved = _MOMENTUM * means + (1 - _MOMENTUM) * seen
  return {"means": jnp.where(count > 0, moved, means)}


def _is_class(labels, classes):
  return (labels >= 0) & (labels < classes)


def _one_hot(labels, classes):
  """One-hot rows; NaN where a label is not a class."""
  hard = jax.nn.one_hot(labels, classes)
  return jnp.where(_is_class(labels, classes)[..., None], hard, jnp.nan)


def _after_the_first(number, first, later):
  if isinstance(number, int):
    return later() if number else first()
  return jnp.where(number == 0, first(), later())


SCHEMES = {
  "none": Distillation(None, _none),
  "recursive": Distillation("previous", _soft),
  "highest": Distillation("first", _soft),
  "progressive": Distillation("first", _mixture(lambda done: 0.7 * done)),
  "resolution": Distillation("first", _resolution),
  "online_label_highest": Distillation("first", _mixture(lambda done: 0.5)),
  "online_label_class_means": Distillation(
    None,
    _class_means,
    lambda classes: {"means": jnp.eye(classes)},
    _learn_class_means,
  ),
}


def get(name: str) -> Distillation:
  """Returns the scheme of that name.

  Raises:
    ValueError: for an unknown name.
  """
  if name not in SCHEMES:
    known = ", ".join(SCHEMES)
    raise ValueError(f"distillation must be one of {known}, got {name!r}")
  return SCHEMES[name]
