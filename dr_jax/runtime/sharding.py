"""Where the arrays of a run live: one mesh of devices with two axes.

  data  the batch is spread over it, and, if asked for, the parameters
  bits  the bit-widths that a step trains at once (`vectorize="vmap"`)

Axis types are Auto: the compiler places what a step computes, from where its
inputs and outputs are. Batch norm sees the whole batch, on all devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PARAMETERS = ("replicated", "sharded")
NORMS = ("global", "per_device")

# Arrays with fewer elements stay replicated: gathering costs more than memory.
_SMALLEST = 4096


class Layout(NamedTuple):
  """How a run is spread over devices.

  Attributes:
    mesh: devices, with the axes "data" and "bits".
    parameters: "replicated", or "sharded" over "data": each device holds a
      part of every large parameter and of its optimizer state (fully sharded
      data parallelism).
    norm: statistics of batch norm over the "global" batch, or "per_device",
      as PyTorch's DistributedDataParallel has them.
    smallest: elements below which an array is never sharded.
  """

  mesh: Mesh
  parameters: str = "replicated"
  norm: str = "global"
  smallest: int = _SMALLEST

  @property
  def data(self) -> int:
    """Devices along the axis "data"."""
    return self.mesh.shape["data"]

  @property
  def bits(self) -> int:
    """Devices along the axis "bits"."""
    return self.mesh.shape["bits"]

  def flat(self) -> Layout:
    """The same devices, all of them along the axis "data"."""
    return self._replace(mesh=_mesh(list(self.mesh.devices.flat), bits=1))

  @property
  def shard(self) -> tuple[int, int]:
    """Which shard of a batch this process feeds, and how many there are.

    Raises:
      ValueError: if processes hold parts of the axis "data" that overlap.
    """
    rows: dict[int, set[int]] = {}
    for (row, _), device in np.ndenumerate(self.mesh.devices):
      rows.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, parts)) != self.data or len({*map(len, parts)}) > 1:
      raise ValueError(
        "devices must be such that processes hold equal parts of the axis data "
        f"that do not overlap, got {parts}"
      )
    mine = tuple(sorted(rows[jax.process_index()]))
    return parts.index(mine), len(parts)

  def shard_batch(self, batch: Any) -> Any:
    """Places a batch on the devices, sharded along the axis "data".

    Args:
      batch: this process's shard, a pytree of [n, ...] arrays.

    Returns:
      The whole batch, a pytree of [n * shards, ...] `jax.Array`s.
    """
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(
        self.batch, np.asarray(x)
      ),
      batch,
    )

  @property
  def batch(self) -> NamedSharding:
    """The sharding of a batch [n, ...]."""
    return NamedSharding(self.mesh, P("data"))

  def spec(self, array: Any) -> P:
    """How a parameter, or a part of its optimizer state, is spread."""
    shape = np.shape(array)
    if self.parameters == "replicated" or math.prod(shape) < self.smallest:
      return P()
    fitting = [axis for axis, n in enumerate(shape) if n % self.data == 0]
    if not fitting:
      return P()
    axis = max(fitting, key=lambda a: (shape[a], a))
    return P(*(None,) * axis, "data")

  def shardings(self, tree: Any) -> Any:
    """A `NamedSharding` for every array of a tree of parameters."""
    return jax.tree.map(
      lambda leaf: NamedSharding(self.mesh, self.spec(leaf)), tree
    )

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(self.mesh, P())


def layout(
  *,
  devices: Sequence[jax.Device] | None = None,
  data: int = 0,
  bits: int = 1,
  parameters: str = "replicated",
  norm: str = "global",
) -> Layout:
  """Builds a layout over devices.

  Args:
    devices: by default `jax.devices()`, those of all processes.
    data: devices along the axis "data"; 0 for all that `bits` leaves.
    bits: devices along the axis "bits".
    parameters, norm: see `Layout`.

  Raises:
    ValueError: for a name that is not allowed, or if there are fewer devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  for name, value, allowed in (
    ("parameters", parameters, PARAMETERS),
    ("norm", norm, NORMS),
  ):
    if value not in allowed:
      known = ", ".join(allowed)
      raise ValueError(f"{name} must be one of {known}, got {value!r}")
  count = len(devices)
  if bits < 1 or count % bits:
    raise ValueError(
      f"bits must be a divisor of {count}, the number of devices, got {bits}"
    )
  if data < 0 or data * bits > count:
    raise ValueError(
      f"data must be in 0..{count // bits} with bits={bits} and {count} "
      f"devices in all, 0 for as many as there are, got {data}"
    )
  data = data or count // bits
  if data * bits < count and jax.process_count() > 1:
    raise ValueError(
      f"data must be 0, all devices, with several processes, got {data}"
    )
  mesh = _mesh(devices[: data * bits], bits=bits)
  return Layout(mesh, parameters, norm)


def _mesh(devices, *, bits):
  return jax.make_mesh(
    (len(devices) // bits, bits),
    ("data", "bits"),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices,
  )
