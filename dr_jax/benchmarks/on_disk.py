"""Bytes of a network on disk, float and in artifacts; see `sizes`."""

from __future__ import annotations

import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from flax import nnx

from dr_jax import deploy, nn, quant
from dr_jax.benchmarks import network
from dr_jax.benchmarks.rows import Rows


class Sizes(NamedTuple):
  """Bytes of one network and rounding.

  Attributes:
    float_bytes: of the float network.
    separate: of an artifact for each bit-width, summed.
    ours: of the artifact of all.
    read: {bits: bytes that opening it at these reads}.
  """

  float_bytes: int
  separate: int
  ours: int
  read: dict[int, int]


def measure(
  setting: network.Setting, roundings: list[str], *, all_layers: bool = False
) -> dict[str, Sizes]:
  """Writes a network in all forms and returns their sizes by rounding."""
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)

    def artifact(bits, rounding):
      path = root / f"{rounding}{bits}"
      model = nn.quantize(
        setting.floating(),
        weight=quant.double_rounding(bits, rounding=rounding),
        activation=quant.lsq_activation(bits),
        sample=setting.batch(1)["image"],
        skip=() if all_layers else nn.first_and_last,
      )
      options = {"num_classes": setting.classes}
      deploy.save(path, model, architecture=(setting.model, options))
      return path

    state = nnx.to_flat_state(nnx.state(setting.floating()))
    arrays = {
      "/".join(map(str, path)): np.asarray(variable[...])
      for path, variable in state
      if isinstance(variable, nnx.Param | nnx.BatchStat)
    }
    safetensors.numpy.save_file(arrays, root / "float")
    separate = [artifact((b,), roundings[0]) for b in setting.bits]
    float_bytes = (root / "float").stat().st_size
    summed = sum(deploy.open(path).stored_bytes for path in separate)
    found = {}
    for rounding in roundings:
      path = artifact(setting.bits, rounding)
      read = {b: deploy.open(path, b).read_bytes for b in setting.bits}
      ours = deploy.open(path).stored_bytes
      found[rounding] = Sizes(float_bytes, summed, ours, read)
    return found


def print_table(name: str, sizes: dict[str, Sizes]) -> None:
  """A row for each rounding."""
  first = next(iter(sizes.values()))
  rows = Rows(
    f"{name}: float {first.float_bytes:,} bytes, separate models "
    f"{first.separate:,} bytes",
    (
      *("rounding", "ours", "of separate"),
      *(f"read at {b} bits" for b in first.read),
    ),
  )
  for rounding, row in sizes.items():
    read = (
      f"{n:,} ({100 * n / row.float_bytes:.1f} %)" for n in row.read.values()
    )
    ratio = f"{row.ours / row.separate:.3f}"
    rows.add(rounding, f"{row.ours:,}", ratio, *read)
  rows.end()
