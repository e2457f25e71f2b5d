"""Batches as a function of the step number.

An endless stream goes through the examples epoch after epoch, each epoch in a
new order that only the seed and the number of the epoch decide. Step s takes
examples s*B to (s+1)*B of that stream, so where a run stands in its data is
its step number, and a resumed run sees what an uninterrupted one would have:
with any number of processes, and of workers that decode images.
"""

import contextlib
import dataclasses
import functools
import sys

import numpy as np

from dr_jax.data.workers import read


def batches(
  source, *, batch_size, seed, process_index=0, process_count=1, workers=0
):
  """Returns the training batches, indexed by step, without end.

  Within an epoch every example occurs exactly once. A batch may hold the end
  of one epoch and the beginning of the next.

  Args:
    source: a `Source`.
    batch_size: examples per step, over all processes together.
    seed: a non-negative integer, decides the order of the examples and their
      augmentation.
    process_index: which share of each batch to return. The shares of all
      processes, one after the other, are the batch of a single process.
    process_count: into how many shares a batch is cut.
    workers: processes that make batches ahead for `stream`; 0 makes them in
      this process.

  Returns:
    `Batches`; `[step]` is {"image": float32 [B, H, W, C], "label": int32 [B]}
    with B = batch_size / process_count, `stream(start)` an iterator from a
    step on.

  Raises:
    ValueError: if batch_size is below 1, above the number of examples, or not
      divisible by process_count, or if seed is negative.
  """
  size = len(source)
  _check_batch_size(batch_size, "1 to the number of examples", size)
  share = _share(batch_size, process_count)
  if seed < 0:
    raise ValueError(f"seed is {seed}, but must be 0 or more")
  first = process_index * share
  return Batches(_Drawn(source, seed, batch_size, first, share), workers)


@dataclasses.dataclass(frozen=True)
class Batches:
  """Training batches; see `batches`."""

  _drawn: "_Drawn"
  _workers: int

  def __getitem__(self, step):
    """Returns the batch of a step, made in this process."""
    return _shown(self._drawn.source, self._drawn(step))

  def stream(self, start=0):
    """Returns an iterator over the batches from a step on; close it."""
    source = self._drawn.source
    made = read(self._drawn, sys.maxsize, start=start, workers=self._workers)
    return _closing(made, lambda batch: _shown(source, batch))


@dataclasses.dataclass(frozen=True)
class _Drawn:
  """One share of every training batch, by step."""

  source: object
  seed: int
  batch_size: int
  first: int
  share: int

  def __call__(self, step):
    start = step * self.batch_size + self.first
    size = len(self.source)
    epoch, offset = divmod(start, size)
    indices = _order(self.seed, epoch, size)[offset : offset + self.share]
    if missing := self.share - len(indices):
      after = _order(self.seed, epoch + 1, size)[:missing]
      indices = np.concatenate([indices, after])
    if hasattr(self.source, "draw"):
      batch = self.source.draw(indices, seed=self.seed, start=start)
      return batch | {"index": indices}
    return _gather(self.source, indices)


@functools.lru_cache(maxsize=4)
def _order(seed, epoch, size):
  # Sorted random words, not Generator.permutation and not grain's shuffle:
  # numpy promises the raw stream of a bit generator for ever, that of a
  # Generator only within a version; grain's costs 20 to 40 microseconds for
  # every single example, and its epoch e of seed s is epoch 0 of seed s + e.
  words = np.random.Philox(np.random.SeedSequence([seed, epoch]))
  return np.argsort(words.random_raw(size), kind="stable")


def epoch(source, *, batch_size, process_index=0, process_count=1, workers=0):
  """Returns one pass over the examples in order, for evaluation.

  All batches have the same shape, so that one compiled program serves them:
  the last one is filled up with copies of its first example, and a mask says
  which examples count. Every process gets equally many. An image that cannot
  be read, where the source skips it, does not count.

  Args:
    source: a `Source`.
    batch_size: examples per batch, over all processes together; may exceed the
      number of examples.
    process_index: which share of each batch to return, as for `batches`.
    process_count: into how many shares a batch is cut.
    workers: processes that make batches ahead; 0 makes them in this process.

  Returns:
    An iterator over {"image": float32 [B, H, W, C], "label": int32 [B],
    "mask": float32 [B], 1 for an example and 0 for filling}, with B =
    batch_size / process_count. Closed or used up, it ends its workers.

  Raises:
    ValueError: if batch_size is below 1, or not divisible by process_count.
  """
  _check_batch_size(batch_size, "1 or more")
  share = _share(batch_size, process_count)
  ordered = _Ordered(source, batch_size, process_index * share, share)
  count = -(-len(source) // batch_size)

  def masked(batch):
    counts = batch["mask"] == 1
    if "unreadable" in batch:
      batch["mask"] = (counts & ~batch["unreadable"]).astype(np.float32)
    return _shown(source, batch, counts)

  return _closing(read(ordered, count, workers=workers), masked)


@dataclasses.dataclass(frozen=True)
class _Ordered:
  """One share of every evaluation batch, by number."""

  source: object
  batch_size: int
  first: int
  share: int

  def __call__(self, number):
    start = number * self.batch_size
    positions = start + self.first + np.arange(self.share)
    mask = positions < len(self.source)
    indices = np.where(mask, positions, start)
    batch = _gather(self.source, indices)
    if "unreadable" in batch:
      batch["index"] = indices
    return batch | {"mask": mask.astype(np.float32)}


def _shown(source, batch, counts=True):
  """Reports unreadable images, and returns what a step sees.

  Called in the training process, where workers have handed the batch over.
  """
  unreadable, index = batch.pop("unreadable", None), batch.pop("index", None)
  if unreadable is not None and (unreadable & counts).any():
    source.report(index[unreadable & counts])
  return source.normalized(batch) if hasattr(source, "normalized") else batch


def _closing(iterator, function):
  """Maps over a generator; closing the result closes the generator."""
  with contextlib.closing(iterator):
    for item in iterator:
      yield function(item)


def _gather(source, indices):
  """Returns the examples at `indices` ([B] integers), for `_shown`."""
  if hasattr(source, "pixels"):
    return source.pixels(indices)
  if hasattr(source, "gather"):
    return source.gather(indices)
  examples = [source[index] for index in indices.tolist()]
  return {
    name: np.stack([example[name] for example in examples])
    for name in ("image", "label")
  }


def _share(batch_size, process_count):
  if batch_size % process_count:
    raise ValueError(
      f"batch_size must be divisible by the number of processes, "
      f"{process_count}, got {batch_size}"
    )
  return batch_size // process_count


def _check_batch_size(batch_size, constraint, limit=None):
  if batch_size < 1 or (limit is not None and batch_size > limit):
    bound = "" if limit is None else f", {limit}"
    raise ValueError(
      f"batch_size must be {constraint}{bound}, got {batch_size}"
    )
