"""Several processes that act as one: who writes, and how they agree.

Training is spread over all of them. Everything else, and every file, is the
first process's; what it finds, or the error it meets, reaches the others.
"""

from __future__ import annotations

import collections
import contextvars
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dr_jax.runtime.signals import STOPPING

# Without a heartbeat for so long a process counts as dead.
_HEARTBEAT_TIMEOUT_S = 30
# For all processes to connect, and at the end to disconnect.
_INIT_TIMEOUT_S = 300


def initialize(*, detect: bool = False) -> bool:
  """Connects to the other processes of this run, if there are any.

  Call it before anything else of JAX. The environment says where they are:
  JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID.

  Args:
    detect: ask the cluster instead (Slurm, Open MPI, Cloud TPU, GKE); see
      `jax.distributed.initialize`.

  Returns:
    Whether there are other processes.

  Raises:
    ValueError: if the variables are incomplete, or the coordinator cannot be
      reached.
  """
  given = {name: os.environ.get(name) for name in _VARIABLES}
  options: dict[str, Any] = {}
  if any(given.values()):
    options |= _options(given)
  elif not detect:
    return False
  try:
    jax.distributed.initialize(
      **options,
      initialization_timeout=_INIT_TIMEOUT_S,
      heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
    )
  except (RuntimeError, ValueError) as error:
    line = " ".join(str(error).split())
    raise ValueError(f"could not connect to the coordinator: {line}") from None
  # The first collective waits only 30 s: run it while all are here.
  on_first(lambda: None)
  return jax.process_count() > 1


_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def _options(given):
  for name, value in given.items():
    if not value:
      raise ValueError(
        f"{name} must be set, as all or none of {', '.join(_VARIABLES)}"
      )
    if name != "JAX_COORDINATOR_ADDRESS" and not value.isdecimal():
      raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
  address, count, number = given.values()
  if int(number) >= int(count):
    raise ValueError(
      f"JAX_PROCESS_ID must be in 0..{int(count) - 1}, below "
      f"JAX_NUM_PROCESSES, got {number}"
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
    SharedError: in every process of several, if the function raised in the
      first one, where it is the cause.
  """
  if jax.process_count() == 1 or _ACTS_FOR_ALL.get():
    return function()
  value, error = None, None
  if is_first():
    token = _ACTS_FOR_ALL.set(True)
    try:
      value = function()
    except Exception as raised:
      error = raised
    finally:
      _ACTS_FOR_ALL.reset(token)
  content = json.dumps(_message(value, error)).encode() if is_first() else b""
  received = json.loads(_broadcast(content))
  if received["error"] is not None:
    raise SharedError(**received["error"]) from error
  return received["value"]


# Set while the first process acts for all: it must not wait for the others.
_ACTS_FOR_ALL = contextvars.ContextVar("acts_for_all", default=False)


class SharedError(RuntimeError):
  """An error of the first process that every process knows and raises.

  Attributes:
    exit_code: that of the first process.
    signal: the number of the signal that stopped it, or None.
  """

  def __init__(self, message: str, exit_code: int, signal: int | None):
    super().__init__(message)
    self.exit_code = exit_code
    self.signal = signal


def _message(value, error):
  if error is None:
    return {"value": value, "error": None}
  return {
    "value": None,
    "error": {
      "message": str(error),
      "exit_code": exit_code(error),
      "signal": getattr(error, "signal", None),
    },
  }


def exit_code(error: BaseException) -> int:
  """The exit code of a process that ends with an error.

  An error's own `exit_code` if it has one; 2 for bad input, and files that
  cannot be read or written; 1 for anything else.
  """
  by_kind = 2 if isinstance(error, ValueError | OSError) else 1
  return getattr(error, "exit_code", by_kind)


def is_lost_peer(error: BaseException) -> bool:
  """Whether an error says that another process has ended or is unreachable."""
  words = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
  return (
    isinstance(error, jax.errors.JaxRuntimeError)
    and jax.process_count() > 1
    and any(word in str(error) for word in words)
  )


def all_agree(agrees: bool) -> bool:
  """Whether all processes pass True; all must call this."""
  if jax.process_count() == 1:
    return agrees
  return bool(multihost_utils.process_allgather(np.int32(agrees)).all())


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
  """Lets every process know of a signal that one of them received.

  All must stop at the same step, since they step together. An answer takes
  `lag` more calls to arrive, so that no call waits for the devices.

  Args:
    interrupted: names a signal that this process received, or None.

  Returns:
    The same for all processes, which must call it equally often.
  """
  if jax.process_count() == 1:
    return interrupted
  names: list[str | None] = [None, *(one.name for one in STOPPING)]
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
