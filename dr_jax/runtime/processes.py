"""Several processes that act as one: who writes, and how they agree.

Training is spread over all of them. Everything else, and every file, is the
first process's; what it finds, or the error it meets, reaches the others.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Seconds without a sign of life after which a process counts as dead.
_HEARTBEAT = 30
# The time it may take for all to come, and at the end to go.
_PATIENCE = 300


def initialize(*, detect: bool = False) -> bool:
  """Joins the other processes of this run, if there are any.

  Call it before anything else of JAX. The environment says where they are:
  JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID.

  Args:
    detect: ask the cluster instead (Slurm, Open MPI, Cloud TPU, GKE); see
      `jax.distributed.initialize`.

  Returns:
    Whether there are other processes.

  Raises:
    ValueError: if the variables are incomplete, or the others do not come.
  """
  given = {name: os.environ.get(name) for name in _VARIABLES}
  options: dict[str, Any] = {}
  if any(given.values()):
    options = _options(given)
  elif not detect:
    return False
  try:
    jax.distributed.initialize(
      **options,
      initialization_timeout=_PATIENCE,
      heartbeat_timeout_seconds=_HEARTBEAT,
    )
  except (RuntimeError, ValueError) as error:
    line = " ".join(str(error).split())
    raise ValueError(f"processes: could not meet: {line}") from None
  # The first collective waits 30 s only: have it while all are here.
  on_first(lambda: None)
  return jax.process_count() > 1


_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def _options(given):
  for name, value in given.items():
    if not value:
      raise ValueError(
        f"{name}: missing; allowed are all or none of {', '.join(_VARIABLES)}"
      )
    if name != "JAX_COORDINATOR_ADDRESS" and not value.isdecimal():
      raise ValueError(f"{name}={value!r}: allowed are whole numbers from 0")
  address, count, number = given.values()
  if int(number) >= int(count):
    raise ValueError(
      f"JAX_PROCESS_ID={number}: allowed are 0 to JAX_NUM_PROCESSES - 1 = "
      f"{int(count) - 1}"
    )
  return {
    "coordinator_address": address,
    "num_processes": int(count),
    "process_id": int(number),
  }


def is_first() -> bool:
  """Whether this process writes the files."""
  return jax.process_index() == 0


def on_first(function: Callable[[], Any]) -> Any:
  """Calls a function in the first process; every process returns its value.

  All processes must call this, in the same order.

  Args:
    function: returns what JSON can hold. It may call `on_first` itself.

  Raises:
    FirstProcessError: elsewhere, if the function raised in the first process;
      there that is raised as it is, with an attribute `told`.
  """
  if jax.process_count() == 1 or _ALONE:
    return function()
  value, error = None, None
  if is_first():
    _ALONE.append(True)
    try:
      value = function()
    except Exception as raised:
      error = raised
      error.told = True
    finally:
      _ALONE.pop()
    message = {
      "value": value,
      "error": None if error is None else str(error),
      "signal": getattr(error, "signal", None),
    }
    content = json.dumps(message).encode()
  else:
    content = b""
  received = json.loads(_broadcast(content))
  if error is not None:
    raise error
  if received["error"] is not None:
    raise FirstProcessError(received["error"], received["signal"])
  return received["value"]


# Not empty while the first process acts for all: it must wait for nobody.
_ALONE: list[bool] = []


class FirstProcessError(ValueError):
  """What the first process met, in its words.

  Attributes:
    signal: the number of the signal that stopped it, or None.
  """

  def __init__(self, message: str, signal: int | None):
    super().__init__(message)
    self.signal = signal


def all_agree(fine: bool) -> bool:
  """Whether every process finds that all is well; all must ask."""
  if jax.process_count() == 1:
    return fine
  return bool(multihost_utils.process_allgather(np.int32(fine)).all())


def gathered(value: Any) -> list[Any]:
  """What every process has, in their order; all must call this.

  Args:
    value: what JSON can hold.
  """
  if jax.process_count() == 1:
    return [value]
  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(content)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(content)] = content
  rows = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


def from_first(tree: Any) -> Any:
  """The first process's arrays, as numpy arrays in every process."""
  if jax.process_count() == 1:
    return tree
  return multihost_utils.broadcast_one_to_all(tree)


def _broadcast(content):
  size = multihost_utils.broadcast_one_to_all(np.int32(len(content)))
  data = np.zeros(int(size), np.uint8)
  if is_first():
    data[:] = np.frombuffer(content, np.uint8)
  return multihost_utils.broadcast_one_to_all(data).tobytes()


def agreed(
  interrupted: Callable[[], str | None], *, lag: int = 4
) -> Callable[[], str | None]:
  """Makes every process hear of a signal that one of them received.

  All must stop at the same step, since they step together. An answer takes
  `lag` more calls to arrive, so that no call waits for the devices.

  Args:
    interrupted: names a signal that this process received, or None.

  Returns:
    The same for all processes, which must call it equally often.
  """
  if jax.process_count() == 1:
    return interrupted
  names: list[str | None] = [None, "SIGINT", "SIGTERM"]
  mesh = jax.make_mesh(
    (jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spread, whole = (
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    for axes in (("all",), ())
  )
  highest = jax.jit(lambda x: x.max(), out_shardings=whole)
  pending: collections.deque[jax.Array] = collections.deque()

  def ask():
    mine = np.full(jax.local_device_count(), names.index(interrupted()))
    pending.append(
      highest(
        jax.make_array_from_process_local_data(spread, mine.astype(np.int32))
      )
    )
    return names[int(pending.popleft())] if len(pending) > lag else None

  return ask
