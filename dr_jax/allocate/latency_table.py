"""How long a network takes, and each of its layers, at every bit-width.

A JSON file, which `python -m dr_jax.benchmarks.latency` writes:

  {"network_ms": {bits: milliseconds}, "layers_ms": {layer: {bits: ...}},
   "measured": {"batch": ..., "backend": ..., "device": ..., ...}}
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dr_jax.allocate.allocation import Allocation
from dr_jax.runtime import files
from dr_jax.runtime.schema import Where

_MS = Where(float, lambda ms: ms >= 0, "milliseconds >= 0")
_BITS = Where(
  {...: _MS},
  lambda row: all(b.isascii() and b.isdecimal() for b in row),
  "{bits: milliseconds}",
)
# Of the file; see `runtime.schema`.
SCHEMA = {
  "network_ms": _BITS,
  "layers_ms": {...: _BITS},
  "measured": {...: object},
}


class LatencyTable(NamedTuple):
  """Measured milliseconds of one batch.

  Attributes:
    network: {bits: milliseconds} of the whole network, all layers at these.
    layers: {layer: {bits: milliseconds}} of each quantized layer alone.
    measured: of what and where, as JSON has it.
  """

  network: dict[int, float]
  layers: dict[str, dict[int, float]]
  measured: dict[str, Any]

  @classmethod
  def load(cls, path: str | os.PathLike) -> LatencyTable:
    """Reads what `save` wrote.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: if it holds anything else, naming file and entry.
    """
    return cls.from_json(files.read_json(path, SCHEMA))

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> LatencyTable:
    """Takes a value that `SCHEMA` describes."""
    layers = value["layers_ms"].items()
    return cls(
      _row(value["network_ms"]),
      {layer: _row(row) for layer, row in layers},
      value["measured"],
    )

  def save(self, path: str | os.PathLike) -> None:
    """Writes a file that `load` reads; it appears complete or not at all."""
    value = {
      "network_ms": self.network,
      "layers_ms": self.layers,
      "measured": self.measured,
    }
    files.write_json(path, value)

  @property
  def layer_seconds(self) -> dict[str, dict[int, float]]:
    """The layers as `allocate.latency` takes them."""
    return {
      layer: {b: ms / 1000 for b, ms in row.items()}
      for layer, row in self.layers.items()
    }

  def check(self, layers: Iterable[str], bits: Sequence[int]) -> None:
    """Checks that it is of a network.

    Raises:
      ValueError: naming what it lacks or has more.
    """
    names = list(layers)
    unknown = [layer for layer in self.layers if layer not in set(names)]
    missing = [layer for layer in names if layer not in self.layers]
    if unknown or missing:
      raise ValueError(
        f"latency table must have the layers of this network, but has unknown "
        f"layers {unknown}, missing layers {missing}"
      )
    for name, row in (("network", self.network), *self.layers.items()):
      for b in bits:
        if b not in row:
          raise ValueError(
            f"latency table must have {tuple(bits)} bits of {name}, but lacks "
            f"{b}"
          )

  def milliseconds(self, allocation: Allocation) -> float:
    """Returns the time of the network with an allocation.

    Of uniform bits it is measured. Others are estimated from the highest
    bit-width, layer by layer:

      network[h] + sum over layers l of (layers[l][bits of l] - layers[l][h])
    """
    used = set(allocation.values())
    if len(used) == 1:
      return self.network[used.pop()]
    highest = max(self.network)
    rows = ((self.layers[layer], b) for layer, b in allocation.items())
    return self.network[highest] + sum(row[b] - row[highest] for row, b in rows)


def _row(milliseconds):
  return {int(b): float(ms) for b, ms in milliseconds.items()}
