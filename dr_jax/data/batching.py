"""Batches as a function of the step number.

An endless stream goes through the examples epoch after epoch, each epoch in a
new order that only the seed and the number of the epoch decide. Step s takes
examples s*B to (s+1)*B of that stream, so where a run stands in its data is
its step number, and a resumed run sees what an uninterrupted one would have:
with any number of processes, and of workers that decode images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Generator

import numpy as np

from dr_jax.data.sources import Batch, Source
from dr_jax.data.workers import read_ahead


def batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  workers: int = 0,
) -> Batches:
  """Returns the training batches, indexed by step, without end.

  Within an epoch every example occurs exactly once. A batch may hold the end
  of one epoch and the beginning of the next.

  Args:
    source: the examples.
    batch_size: examples per step, over all processes together.
    seed: a non-negative integer, decides the order of the examples and their
      augmentation.
    process_index: which shard of each batch to return. The shards of all
      processes, one after the other, are the batch of a single process.
    process_count: into how many shards a batch is cut.
    workers: processes that make batches ahead for `stream`; 0 makes them in
      this process.

  Returns:
    `Batches`; `[step]` is {"image": float32 [B, H, W, C], "label": int32 [B]}
    with B = batch_size / process_count, `stream(start)` an iterator from a
    step on.

  Raises:
    ValueError: if batch_size is below 1, above the number of examples, or not
      divisible by process_count, or if seed is negative.

  >>> from dr_jax.data import ArraySource
  >>> source = ArraySource(
  ...   np.zeros((6, 8, 8, 1), np.float32), np.arange(6, dtype=np.int32)
  ... )
  >>> steps = batches(source, batch_size=3, seed=0)
  >>> [steps[step]["label"].tolist() for step in range(4)]
  [[0, 3, 5], [1, 2, 4], [3, 4, 2], [1, 5, 0]]
  """
  if not 1 <= batch_size <= len(source):
    raise ValueError(
      f"batch_size must be in 1..{len(source)}, the number of examples, got "
      f"{batch_size}"
    )
  size = _shard_size(batch_size, process_count)
  if seed < 0:
    raise ValueError(f"seed must be >= 0, got {seed}")
  shard = _TrainingShard(source, seed, batch_size, process_index * size, size)
  return Batches(shard, workers)


@dataclasses.dataclass(frozen=True)
class Batches:
  """Training batches; see `batches`."""

  _shard: _TrainingShard
  _workers: int

  def __getitem__(self, step: int) -> Batch:
    """Returns the batch of a step, made in this process."""
    return _finished(self._shard.source, self._shard(step))

  def stream(self, start: int = 0) -> Generator[Batch, None, None]:
    """Returns an iterator over the batches from a step on; close it."""
    source, workers = self._shard.source, self._workers
    made = read_ahead(self._shard, sys.maxsize, start=start, workers=workers)
    return _map_and_close(lambda batch: _finished(source, batch), made)


@dataclasses.dataclass(frozen=True)
class _TrainingShard:
  """One shard of every training batch, by step.

  Attributes:
    first: position of the shard in its batch.
    size: examples of the shard.
  """

  source: Source
  seed: int
  batch_size: int
  first: int
  size: int

  def __call__(self, step: int) -> Batch:
    start = step * self.batch_size + self.first
    epoch, offset = divmod(start, len(self.source))
    indices = self._order(epoch)[offset : offset + self.size]
    if missing := self.size - len(indices):
      indices = np.concatenate([indices, self._order(epoch + 1)[:missing]])
    batch = self.source.draw(indices, seed=self.seed, start=start)
    return batch | {"index": indices}

  def _order(self, epoch: int) -> np.ndarray:
    return _order(self.seed, epoch, len(self.source))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
  # Sorted random words, not Generator.permutation and not grain's shuffle:
  # numpy promises the raw stream of a bit generator forever, that of a
  # Generator only within a version; grain's costs 20 to 40 microseconds for
  # every single example, and its epoch e of seed s is epoch 0 of seed s + e.
  words = np.random.Philox(np.random.SeedSequence([seed, epoch]))
  return np.argsort(words.random_raw(size), kind="stable")


def epoch(
  source: Source,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  workers: int = 0,
) -> Generator[Batch, None, None]:
  """Returns one pass over the examples in order, for evaluation.

  All batches have the same shape, so that one compiled program serves them:
  the last one is filled up with copies of its first example, and a mask says
  which examples count. Every process gets equally many. An image that cannot
  be read, where the source skips it, does not count.

  Args:
    source: the examples.
    batch_size: examples per batch, over all processes together; may exceed the
      number of examples.
    process_index: which shard of each batch to return, as for `batches`.
    process_count: into how many shards a batch is cut.
    workers: processes that make batches ahead; 0 makes them in this process.

  Returns:
    An iterator over {"image": float32 [B, H, W, C], "label": int32 [B],
    "mask": float32 [B], 1 for an example and 0 for filling}, with B =
    batch_size / process_count. Closed or used up, it ends its workers.

  Raises:
    ValueError: if batch_size is below 1, or not divisible by process_count.

  >>> from dr_jax.data import ArraySource
  >>> source = ArraySource(
  ...   np.zeros((5, 8, 8, 1), np.float32), np.arange(5, dtype=np.int32)
  ... )
  >>> for batch in epoch(source, batch_size=3):
  ...   print(batch["label"], batch["mask"])
  [0 1 2] [1. 1. 1.]
  [3 4 3] [1. 1. 0.]
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be >= 1, got {batch_size}")
  size = _shard_size(batch_size, process_count)
  shard = _EvaluationShard(source, batch_size, process_index * size, size)
  count = -(-len(source) // batch_size)
  made = read_ahead(shard, count, workers=workers)
  return _map_and_close(lambda batch: _finished(source, batch), made)


@dataclasses.dataclass(frozen=True)
class _EvaluationShard:
  """One shard of every evaluation batch, by number; as `_TrainingShard`."""

  source: Source
  batch_size: int
  first: int
  size: int

  def __call__(self, number: int) -> Batch:
    start = number * self.batch_size
    positions = start + self.first + np.arange(self.size)
    mask = positions < len(self.source)
    indices = np.where(mask, positions, start)
    return self.source.read(indices) | {"index": indices, "mask": mask}


def _shard_size(batch_size: int, process_count: int) -> int:
  if batch_size % process_count:
    raise ValueError(
      f"batch_size must be divisible by {process_count}, the number of "
      f"processes, got {batch_size}"
    )
  return batch_size // process_count


def _finished(source: Source, batch: Batch) -> Batch:
  """Reports unreadable images, and returns what a step sees.

  Called in the process that trains, after workers have handed the batch over.
  """
  index = batch.pop("index")
  unreadable = batch.pop("unreadable", np.zeros(len(index), bool))
  if "mask" in batch:
    unreadable = unreadable & batch["mask"]
    batch["mask"] = (batch["mask"] & ~unreadable).astype(np.float32)
  if unreadable.any():
    source.report(index[unreadable])
  return source.finish(batch)


def _map_and_close(
  function: Callable[[Batch], Batch], iterator: Generator[Batch, None, None]
) -> Generator[Batch, None, None]:
  """Maps over a generator; closing the result closes the generator."""
  with contextlib.closing(iterator):
    for item in iterator:
      yield function(item)
