"""Reading ahead: batches made in order by this process or by workers."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator

import grain
from absl import flags

from dr_jax.data.sources import Batch
from dr_jax.runtime.signals import STOPPING


class WorkerError(OSError):
  """A process that decodes images was killed."""


def read_ahead(
  batch: Callable[[int], Batch], count: int, *, start: int = 0, workers: int = 0
) -> Generator[Batch, None, None]:
  """Yields `batch(start)`, `batch(start + 1)`, ... up to `count`.

  Args:
    batch: step number -> dict of arrays; with workers it must be picklable.
    count: the number of the last step, plus 1.
    start: the number of the first step.
    workers: processes that call `batch`, worker w of W for every W-th step;
      each is at most four batches ahead. 0 calls it in this process, when a
      batch is asked for.

  Yields:
    Batches in the order of their numbers. Closing the generator ends the
    workers.

  Raises:
    WorkerError: if a worker is killed.
  """
  if not workers:
    for number in range(start, count):
      yield batch(number)
    return
  # Grain reads its own flags, and a program without absl parses none.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  steps = grain.MapDataset.range(start, count).map(batch)
  # Grain would start 16 threads in every worker, which compete for its core,
  # and keep 500 batches there.
  without_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  iterator = iter(
    steps.to_iter_dataset(without_threads).mp_prefetch(
      grain.multiprocessing.MultiprocessingOptions(num_workers=workers),
      worker_init_fn=_follow_parent,
    )
  )
  try:
    yield from iterator
  except RuntimeError as error:
    raise WorkerError(
      f"workers={workers} failed: {error} (out of memory, or of shared memory "
      "in /dev/shm, of which each needs about four batches)"
    ) from None
  except (ValueError, OSError) as error:
    raise error.with_traceback(None) from None
  finally:
    iterator.close()
    # What ended the iterator is part of a reference cycle that holds the last
    # batches; their shared memory would be left when Python exits.
    gc.collect()


def _follow_parent(worker: int, workers: int) -> None:
  """Starts a worker that ends when its parent asks, or has ended itself.

  Ctrl-C, a scheduler's SIGTERM and the SIGHUP of a terminal that closes reach
  every process; the parent still wants the batches of the steps before its
  checkpoint. A parent that is killed cannot ask, and would leave workers that
  wait forever.
  """
  del worker, workers
  for number in STOPPING:
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def exit_with_parent():
    parent.join()
    os._exit(1)

  threading.Thread(target=exit_with_parent, daemon=True).start()
