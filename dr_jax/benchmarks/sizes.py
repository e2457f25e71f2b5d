"""Bytes on disk of one artifact, compared with float and with four models.

  python -m dr_jax.benchmarks.sizes [--model=resnet20,resnet18]
      [--rounding=half_up,floor] [--bits=8,6,4,2] [--all_layers]

Of each network: the float network as a safetensors file, the artifacts of each
bit-width alone (`separate`, their sum), the artifact of all (`ours`), and what
`deploy.open(path, bits=b)` reads of that, also in percent of float. Sizes do
not depend on what a network has learned: it is not trained here.
"""

from __future__ import annotations

import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from absl import app, flags
from flax import nnx
from rich.console import Console
from rich.table import Table

from dr_jax import deploy, nn, quant
from dr_jax.benchmarks import network
from dr_jax.pipeline.summary import environment

_MODELS = flags.DEFINE_list("model", ["resnet20"], "Networks.")
_ROUNDINGS = flags.DEFINE_list(
  "rounding", list(quant.ROUNDINGS), "Rules of the second rounding."
)
_BITS = flags.DEFINE_list("bits", ["8", "6", "4", "2"], "Bit-widths.")
_ALL = flags.DEFINE_bool(
  "all_layers", False, "Quantize the first and the last layer too."
)


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


def table(name: str, sizes: dict[str, Sizes]) -> Table:
  """A row for each rounding."""
  first = next(iter(sizes.values()))
  shown = Table(
    title=f"{name}: float {first.float_bytes:,} bytes, separate models "
    f"{first.separate:,} bytes"
  )
  shown.add_column("rounding")
  for column in (
    *("ours", "of separate"),
    *(f"read at {b} bits" for b in first.read),
  ):
    shown.add_column(column, justify="right")
  for rounding, row in sizes.items():
    read = (
      f"{n:,} ({100 * n / row.float_bytes:.1f} %)" for n in row.read.values()
    )
    ratio = f"{row.ours / row.separate:.3f}"
    shown.add_row(rounding, f"{row.ours:,}", ratio, *read)
  return shown


def main(argv):
  del argv
  console = Console(width=120)
  bits = tuple(map(int, _BITS.value))
  for name in _MODELS.value:
    setting = network.Setting(name, bits=bits)
    sizes = measure(setting, _ROUNDINGS.value, all_layers=_ALL.value)
    console.print(table(name, sizes))
  console.print(environment())


if __name__ == "__main__":
  app.run(main)
