"""Batches as a function of the step number.

An endless stream goes through the examples epoch after epoch, each epoch in a
new order that only the seed and the number of the epoch decide. Step s takes
examples s*B to (s+1)*B of that stream, so where a run stands in its data is
its step number, and a resumed run sees what an uninterrupted one would have.
"""

import functools
import sys

import grain
import numpy as np


def batches(source, *, batch_size, seed, process_index=0, process_count=1):
  """Returns the training batches, indexed by step, without end.

  Within an epoch every example occurs exactly once. A batch may hold the end
  of one epoch and the beginning of the next.

  Args:
    source: a `Source`.
    batch_size: examples per step, over all processes together.
    seed: a non-negative integer, decides the order of the examples.
    process_index: which share of each batch to return. The shares of all
      processes, one after the other, are the batch of a single process.
    process_count: into how many shares a batch is cut.

  Returns:
    A `grain.MapDataset`; `[step]` is {"image": float32 [B, H, W, C], "label":
    int32 [B]} with B = batch_size / process_count. Where loading an example
    takes time, `to_iter_dataset` reads ahead in threads.

  Raises:
    ValueError: if batch_size is below 1, above the number of examples, or not
      divisible by process_count, or if seed is negative.
  """
  size = len(source)
  _check_batch_size(batch_size, "1 to the number of examples", size)
  if batch_size % process_count:
    raise ValueError(
      f"data.batch_size is {batch_size}, but must be divisible by the number"
      f" of processes, {process_count}"
    )
  if seed < 0:
    raise ValueError(f"seed is {seed}, but must be 0 or more")
  share = batch_size // process_count

  @functools.lru_cache(maxsize=2)
  def order(epoch):
    # Sorted random words, not Generator.permutation and not grain's shuffle:
    # numpy promises the raw stream of a bit generator for ever, that of a
    # Generator only within a version; grain's costs 20 to 40 microseconds for
    # every single example, and its epoch e of seed s is epoch 0 of seed s + e.
    words = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(words.random_raw(size), kind="stable")

  def batch(step):
    start = step * batch_size + process_index * share
    epoch, offset = divmod(start, size)
    indices = order(epoch)[offset : offset + share]
    if missing := share - len(indices):
      indices = np.concatenate([indices, order(epoch + 1)[:missing]])
    return _gather(source, indices)

  return grain.MapDataset.range(sys.maxsize).map(batch)


def epoch(source, *, batch_size):
  """Returns one pass over the examples in order, for evaluation.

  All batches have the same shape, so that one compiled program serves them:
  the last one is filled up with copies of its first example, and a mask tells
  which examples count.

  Args:
    source: a `Source`.
    batch_size: examples per batch; may exceed the number of examples.

  Returns:
    An iterator over {"image": float32 [B, H, W, C], "label": int32 [B],
    "mask": float32 [B], 1 for an example and 0 for filling}.

  Raises:
    ValueError: if batch_size is below 1.
  """
  _check_batch_size(batch_size, "1 or more")

  def batch(start):
    positions = np.arange(start, start + batch_size)
    mask = positions < len(source)
    indices = np.where(mask, positions, start)
    return _gather(source, indices) | {"mask": mask.astype(np.float32)}

  return (batch(start) for start in range(0, len(source), batch_size))


def _gather(source, indices):
  """Returns the examples at `indices` ([B] integers) as one batch."""
  if hasattr(source, "gather"):
    return source.gather(indices)
  examples = [source[index] for index in indices.tolist()]
  return {
    name: np.stack([example[name] for example in examples])
    for name in ("image", "label")
  }


def _check_batch_size(batch_size, allowed, limit=None):
  if batch_size < 1 or (limit is not None and batch_size > limit):
    bound = "" if limit is None else f", {limit}"
    raise ValueError(
      f"data.batch_size is {batch_size}, but must be {allowed}{bound}"
    )
