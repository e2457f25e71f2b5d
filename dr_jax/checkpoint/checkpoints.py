"""Checkpoints of a training run: asynchronous, atomic, verified.

The only file that knows Orbax. To Orbax a state is one flat dictionary (see
`checkpoint.snapshot`); its structure comes back from the `like` that `restore`
is given. The manifest next to the arrays is for two things that Orbax lets pass
in silence: a flipped bit in an array, and a dtype other than the one that was
saved.

    with Checkpoints(directory) as checkpoints:
      if checkpoints.latest() is not None:
        state = checkpoints.restore(like=state)
      ...
      checkpoints.save(step, state)
"""

from __future__ import annotations

import contextlib
import os
import textwrap
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from orbax.checkpoint import v1 as ocp

from dr_jax.checkpoint import failures
from dr_jax.checkpoint.snapshot import (
  Snapshot,
  checksums,
  difference,
  key_data,
  unsealed,
)
from dr_jax.runtime.processes import all_agree, on_first
from dr_jax.runtime.tree import array_bytes, named_leaves


class CheckpointError(Exception):
  """A checkpoint is missing, damaged, or of another state."""

  exit_code = 2


class _DamagedError(CheckpointError):
  """What is on disk is not what was saved."""


# How many checkpoints a run keeps: one to resume from, one if it is damaged.
KEEP = 2

# Orbax's flag: barrier through the coordination service.
_BARRIER = "experimental_orbax_use_distributed_barrier"


def disk_bytes(state: Any, *, keep: int = KEEP) -> int:
  """Returns how many bytes the checkpoints of a state take on disk at most.

  One more than are kept, since the oldest is deleted only when the newest is
  complete; and what Orbax writes besides the arrays, by measurement less than
  64 KiB and 2 KiB for each array.

  Args:
    state: as for `Checkpoints.save`, or of `jax.ShapeDtypeStruct`s.
    keep: as for `Checkpoints`.

  >>> disk_bytes({"w": jax.ShapeDtypeStruct((1000,), jnp.float32)}, keep=1)
  143168
  """
  leaves = named_leaves(state)
  return (keep + 1) * (array_bytes(leaves) + 2048 * len(leaves) + 65536)


class Checkpoints:
  """The checkpoints of one run, one subdirectory per step.

  A checkpoint appears under its step number only when it is complete. What a
  killed process left incomplete is removed on opening, so a directory takes one
  writer at a time.

  Attributes:
    directory: absolute path of the checkpoints.

  >>> import tempfile
  >>> state = {"w": jnp.arange(3.0)}
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   with Checkpoints(folder) as checkpoints:
  ...     checkpoints.save(7, state, blocking=True)
  ...     restored = checkpoints.restore(like=state)
  ...     checkpoints.latest(), restored["w"].tolist()
  (7, [0.0, 1.0, 2.0])
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int = KEEP):
    """Opens a directory of checkpoints, creating it if necessary.

    Args:
      directory: local path, or a URL that Orbax can write to.
      keep: how many of the newest checkpoints to keep; older ones are deleted.
    """
    path = os.fspath(directory)
    self.directory = path if "://" in path else os.path.abspath(path)
    self._keep = keep
    self._failed: list[Exception] = []
    handlers = ocp.handlers.local_registry(include_global_registry=False)
    handlers.add(
      failures.recording_handler(self._failed), checkpointable_name="state"
    )
    # By default, Orbax stores a dictionary of numbers as arrays.
    handlers.add(ocp.handlers.JsonHandler, checkpointable_name="manifest")
    context = ocp.Context()
    if jax.process_count() > 1:
      # Neither may wait for the devices, where steps are under way: barriers,
      # and slicing arrays into a part for each process.
      if _BARRIER in flags.FLAGS:
        flags.FLAGS[_BARRIER].value = True
      context.array.saving.use_replica_parallel = False
    # Reading together, Orbax lets processes that can read wait for those that
    # cannot.
    self._alone = ocp.Context()
    self._alone.multiprocessing.active_processes = {jax.process_index()}
    self._alone.multiprocessing.primary_host = jax.process_index()
    for each in (context, self._alone):
      each.checkpointables.registry = handlers
    self._orbax = ocp.training.Checkpointer(
      self.directory,
      context=context,
      # pyrefly: ignore  # A protocol of Orbax that its own class misses.
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    )
    # As the first process sees it: on a network drive others may not yet. Later
    # changes are known to all.
    self._steps = on_first(self._clean)

  def _clean(self):
    """Removes incomplete checkpoints; returns the steps of the others."""
    # Orbax's own cleanup runs in a thread that nothing waits for.
    for path in epath.Path(self.directory).glob("*.orbax-checkpoint-tmp*"):
      path.rmtree()
    return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

  def save(self, step: int, state: Any, *, blocking: bool = False) -> None:
    """Saves a state as the latest one.

    Returns as soon as the arrays are on the host; their buffers may be donated
    right away. Waits for the previous save, if it has not finished, and raises
    its error. Checkpoints of this or a later step are deleted first: they are
    of a run that was resumed from an earlier step.

    Args:
      step: integer, counts from 0.
      state: nested dicts with string keys, tuples and named tuples of
        `jax.Array`s, typed PRNG keys among them; or a `Snapshot` of one.
      blocking: whether to return only when the checkpoint is on disk.

    Raises:
      TypeError: if a leaf is not a `jax.Array`.
      ValueError: if two leaves have the same path.
      CheckpointError: if this save or the one before it fails; the latest
        complete checkpoint is unharmed.
    """
    taken = state if isinstance(state, Snapshot) else Snapshot(state)
    self.wait()
    self.delete_from(step)
    with self._failures():
      self._steps = [*self._steps, step][-self._keep :]
      self._orbax.save_checkpointables_async(
        step,
        {"state": taken.arrays, "manifest": taken.manifest()},
        force=True,
      )
    if blocking:
      self.wait()

  def delete_from(self, step: int) -> None:
    """Deletes the checkpoints of a step and of later ones.

    Raises:
      CheckpointError: if one cannot be deleted.
    """
    with self._failures():
      for later in [other for other in self._steps if other >= step]:
        self._steps.remove(later)
        self._orbax.delete(later)

  def restore(self, step: int | None = None, *, like: Any) -> Any:
    """Returns a saved state, bit for bit.

    Args:
      step: which one; by default the latest, or if that is damaged, with a
        warning, the one before it.
      like: a state of the same structure, of arrays or `jax.ShapeDtypeStruct`s,
        that also says where each array goes: to the `sharding` of its leaf;
        without one, or for an array that is not committed to a device, to
        the default device, uncommitted.

    Raises:
      CheckpointError: if there is no such checkpoint, if it is damaged and no
        other can take its place, or if it holds another structure, shape or
        dtype than `like`.
    """
    self.wait()
    steps = self._steps
    if not steps or step not in (None, *steps):
      wanted = "" if step is None else f" of step {step}"
      held = ", ".join(map(str, steps)) or "none"
      raise CheckpointError(
        f"no checkpoint{wanted} in {self.directory} (there are: {held})"
      )
    if step is not None:
      return self._load(step, like)
    errors = []
    for candidate in reversed(steps):
      try:
        state = self._load(candidate, like)
      except _DamagedError as error:
        errors.append(error)
        continue
      for error in errors:
        warnings.warn(f"{error}; taking step {candidate}", stacklevel=2)
      return state
    raise errors[0]

  def latest(self) -> int | None:
    """Returns the step of the latest checkpoint, or None if there is none."""
    return max(self._steps, default=None)

  def wait(self) -> None:
    """Waits until the last save is on disk.

    Raises:
      CheckpointError: if it could not be saved.
    """
    with self._failures():
      if jax.process_count() > 1:
        self._wait_with_others()
      self._orbax.wait()

  def _wait_with_others(self):
    """Waits as Orbax does, but not for others after a failure in this process.

    The others wait for this one, until it ends.
    """
    waiting = threading.Thread(target=self._try_to_wait, daemon=True)
    waiting.start()
    while waiting.is_alive():
      if self._failed:
        raise self._failed[0]
      waiting.join(0.01)

  def _try_to_wait(self):
    # `wait` raises the same again.
    with contextlib.suppress(Exception):
      self._orbax.wait()

  def close(self) -> None:
    """Waits, and releases the directory; raises as `wait`."""
    with self._failures():
      self._orbax.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    lost = isinstance(error, (CheckpointError, jax.errors.JaxRuntimeError))
    if not (lost and jax.process_count() > 1):
      self.close()

  def _load(self, step, like):
    path = self._path(step)
    wanted = named_leaves(like)
    shardings = {name: _sharding(leaf) for name, leaf in wanted.items()}
    saved: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    error = None
    try:
      saved = self._saved(step, wanted)
      arrays = self._arrays(step, wanted, shardings)
    except CheckpointError as raised:
      error = raised
    _all_or_none(path, error)
    sums = checksums(arrays)
    for name in wanted:
      if sums[name] != saved[name].get("sum32"):
        error = error or _damaged(path, f"checksum of {name} differs")
    _all_or_none(path, error)
    leaves = []
    for name in wanted:
      array = arrays[name]
      if shardings[name] is None:
        array = jnp.asarray(np.asarray(array))
      if (impl := saved[name]["key_impl"]) is not None:
        array = jax.random.wrap_key_data(array, impl=impl)
      leaves.append(array)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)

  def _saved(self, step, wanted):
    """What the manifest says of the leaves, if they are those wanted."""
    saved = unsealed(self._read(step, "manifest", None))
    if saved is None:
      raise _damaged(self._path(step), "checksum of the manifest differs")
    if differs := difference(saved, wanted):
      raise CheckpointError(
        f"{self._path(step)} holds another state: {differs}"
      )
    return saved

  def _arrays(self, step, wanted, shardings):
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
      name: jax.ShapeDtypeStruct(
        data.shape, data.dtype, sharding=shardings[name] or default
      )
      for name, data in jax.eval_shape(key_data, wanted).items()
    }
    return self._read(step, "state", abstract)

  def _read(self, step, name, abstract):
    path = self._path(step)
    try:
      with failures.quiet(), self._alone:
        return ocp.load_checkpointables(path, {name: abstract})[name]
    except Exception as error:
      raise _damaged(path, error.__cause__ or error) from error

  def _is_there(self, step):
    return epath.Path(self._path(step)).exists()

  def _path(self, step):
    return os.path.join(self.directory, str(step))

  @contextlib.contextmanager
  def _failures(self):
    """Reports in one line what Orbax could not write, whatever it raises."""
    try:
      yield
    except Exception as error:
      # Another process has ended: that does not concern checkpoints.
      lost = isinstance(error, jax.errors.JaxRuntimeError)
      if lost and jax.process_count() > 1:
        raise
      # What was under way is not there.
      self._steps = [*filter(self._is_there, self._steps)]
      step = self.latest()
      kept = "none is kept" if step is None else f"that of step {step} is kept"
      raise CheckpointError(
        f"{self.directory}: a checkpoint could not be saved, {kept} "
        f"({textwrap.shorten(str(error), 400)})"
      ) from error


def _all_or_none(path, error):
  """Raises in every process if any has an error, so that none continues."""
  if not all_agree(error is None):
    raise error or _damaged(path, "another process cannot read it")


def _damaged(path, reason):
  reason = textwrap.shorten(str(reason), 200)
  return _DamagedError(f"damaged checkpoint {path}: {reason}")


def _sharding(leaf):
  """Returns where to put a leaf, None for anywhere."""
  committed = getattr(leaf, "committed", True)
  return getattr(leaf, "sharding", None) if committed else None
