"""What report/network.json says of a trained network: its form.

  {"stage": of the network,
   "gradients": {"examples": n, "scales": [{"layer": name, "of": "weight" or
     "input", "gradient": {bits: largest magnitude}}]},
   "weights": {layer: {bits: {"low", "high", "counts", "levels"}}}}

A histogram of weights has `counts` in equal bins from `low` to `high`, in units
in which all channels of the layer have the same grid, `levels`; those are empty
where there is no such unit. `pipeline.network_record` measures it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dr_jax.runtime.schema import COUNT, Where

FILE = "report/network.json"

_HISTOGRAM = {
  "low": float,
  "high": float,
  "counts": [COUNT],
  "levels": [float],
}
_SCALE = {
  "layer": str,
  "of": Where(str, ("weight", "input").__contains__, "weight or input"),
  "gradient": {...: float},
}


def schema_of(bits: Iterable[int]) -> Any:
  """The form of a record of a network with these candidate bit-widths."""
  by_bits: Any = {str(b): _HISTOGRAM for b in bits}
  return {
    "stage": str,
    "gradients": {"examples": COUNT, "scales": [_SCALE]},
    "weights": {...: by_bits},
  }
