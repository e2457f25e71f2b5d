"""Test accuracy and cross-entropy of a network at one bit-width."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.nn import Functional
from dr_jax.runtime.compilation import jit
from dr_jax.runtime.sharding import Layout
from dr_jax.train.distill import cross_entropies

# Batches on their way to the device before the first result is looked at.
_AHEAD = 2


class Score(NamedTuple):
  """What a network reaches on a data set.

  Attributes:
    accuracy: top-1, in percent.
    loss: mean cross-entropy.
  """

  accuracy: float
  loss: float


def make_evaluate(
  network: Functional, layout: Layout | None = None
) -> Callable[..., Score]:
  """Builds a function that scores a network at one assignment of bits.

  Args:
    network: `nn.functional(model)`, quantized or float.
    layout: over whose devices batches are spread, all of this process; None
      leaves it to JAX.

  Returns:
    `evaluate(params, batch_stats, index, batches) -> Score`. `index` is traced,
    as in `nn.Functional.apply`: one program serves every assignment. `batches`
    are those of `data.epoch`: {"image" [n, ...], "label" int [n, ...], "mask"
    float [n]}. An example counts with the mean over its labels, one with mask 0
    does not count, and a label that is not a class makes the loss NaN.

  Raises:
    ValueError: by `evaluate`, for batches without an example.
  """

  @jit
  def counts(params, batch_stats, index, batch):
    logits, _ = network.apply(params, batch_stats, index, batch["image"])
    losses = cross_entropies(logits, batch["label"])
    correct = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
    losses, correct = map(_of_examples, (losses, correct))
    mask = batch["mask"]
    losses = jnp.where(mask > 0, losses * mask, 0)
    return (correct * mask).sum(), losses.sum(), mask.sum()

  def evaluate(
    params: Any, batch_stats: Any, index: Any, batches: Iterable[Any]
  ) -> Score:
    index = jnp.asarray(index, jnp.int32)
    arrays = (params, batch_stats)
    if layout is not None:
      arrays = jax.device_put(arrays, layout.replicated)
      batches = map(layout.shard_batch, batches)
    sums, pending = np.zeros(3), collections.deque()
    for batch in batches:
      pending.append(counts(*arrays, index, batch))
      if len(pending) > _AHEAD:
        sums += np.array(pending.popleft(), np.float64)
    for counted in pending:
      sums += np.array(counted, np.float64)
    correct, loss, number = map(float, sums)
    if not number:
      raise ValueError("batches must hold an example, got none")
    return Score(accuracy=100 * correct / number, loss=loss / number)

  return evaluate


def _of_examples(values):
  """Means over the labels of each example, [n] of [n, ...]."""
  return values.reshape(len(values), -1).mean(-1)
