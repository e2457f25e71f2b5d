"""Reading ahead: batches made in order by this process or by workers."""

import gc
import multiprocessing
import os
import signal
import threading

import grain
from absl import flags


class WorkerError(OSError):
  """A process that decodes images has ended, killed by something else."""


def read(batch, count, *, start=0, workers=0):
  """Yields `batch(start)`, `batch(start + 1)`, ... up to `count`.

  Args:
    batch: step number -> dict of arrays; with workers it must be picklable.
    count: the number of the last step, plus 1.
    start: the number of the first step.
    workers: processes that call `batch`, worker w of W for every W-th step;
      each is at most four batches ahead. 0 calls it in this process, when
      asked.

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
  # Without threads: grain would start 16 in every worker, which take the time
  # from each other, and keep 500 batches there.
  alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  iterator = iter(
    steps.to_iter_dataset(alone).mp_prefetch(
      grain.multiprocessing.MultiprocessingOptions(num_workers=workers),
      worker_init_fn=_begin,
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


def _begin(worker, workers):
  """Begins a worker: its parent alone decides when it ends.

  Ctrl-C and a scheduler's SIGTERM reach every process; the parent still wants
  the batches of the steps before its checkpoint. A parent that is killed says
  nothing, and leaves workers that wait for ever.
  """
  del worker, workers
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def follow():
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
