"""Time of a switch of a deployed network, compared with moving its bytes.

  python -m dr_jax.benchmarks.switch [--model=resnet50] [--lower=4] [--higher=8]

In memory, a switch is compared with a copy of the bytes of the whole network.
A switch that reads missing bit-planes is compared with a plain read of the same
bytes from the page cache; it also verifies them, unpacks them and merges them
into the codes. Medians over rounds in which all take turns, in one process. The
network has random weights: time depends on shapes.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import flags

from dr_jax import deploy
from dr_jax.benchmarks import network
from dr_jax.benchmarks.rows import Rows, prepared, turns
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command, compilation

FLAGS = flags.FLAGS


_BITS = (8, 6, 4, 2)


class Measured(NamedTuple):
  """Seconds of a switch and of what it is compared with, one for each round.

  Attributes:
    count: bytes that the comparison moves.
    switch: seconds of switches.
    plain: seconds of copying or reading so many bytes.
  """

  count: int
  switch: list[float]
  plain: list[float]


def define_flags() -> None:
  """Defines what the command takes; some names are also those of others."""
  flags.DEFINE_enum("model", "resnet50", network.NAMES, "Network.")
  flags.DEFINE_integer("lower", 4, "Bit-width to start with.")
  flags.DEFINE_integer("higher", 8, "Bit-width to switch to.")
  flags.DEFINE_integer("rounds", 5, "Rounds.", lower_bound=1)


def main():
  compilation.cache_on_disk()
  setting = network.Setting(FLAGS.model, bits=_BITS)
  with tempfile.TemporaryDirectory() as folder:
    path = prepared(
      setting.model, lambda: setting.save(pathlib.Path(folder) / "model")
    )
    rows = {
      "in memory": in_memory(path, setting, FLAGS.rounds),
      "with missing planes": with_reading(
        path, setting, FLAGS.lower, FLAGS.higher, FLAGS.rounds
      ),
    }
  title = f"{setting.model}, {FLAGS.lower} to {FLAGS.higher} bits"
  print_table(title, rows)
  print(environment())


def in_memory(
  path: pathlib.Path, setting: network.Setting, rounds: int
) -> Measured:
  """Switches between the candidates, all planes being there."""
  served = deploy.Switchable(path, model=setting.floating())
  model = np.ones(deploy.open(path).tensor_bytes, np.uint8)
  target = np.empty_like(model)
  switch, plain = [], []
  for turn in range(10 * rounds):
    bits = setting.bits[turn % len(setting.bits)]
    switch.append(_seconds(lambda bits=bits: served.switch(bits)))
    plain.append(_seconds(lambda: np.copyto(target, model)))
  return Measured(model.nbytes, switch, plain)


def with_reading(
  path: pathlib.Path,
  setting: network.Setting,
  start: int,
  end: int,
  rounds: int,
) -> Measured:
  """Switches to bits whose planes were not read."""
  opened, model = deploy.open(path, start), setting.floating()
  count = opened.upgrade(end).read_bytes - opened.read_bytes
  switch, plain = [], []
  for _ in turns(rounds):
    served = deploy.Switchable(opened, model=model)
    switch.append(_seconds(lambda served=served: served.switch(end)))
    plain.append(_seconds(lambda: _read(path / "model.safetensors", count)))
  return Measured(count, switch, plain)


def _read(path, count):
  """Reads the last bytes of a file, where its planes are."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, count, size - count)
  finally:
    os.close(descriptor)


def _seconds(call: Callable[[], object]) -> float:
  started = time.perf_counter()
  call()
  return time.perf_counter() - started


def print_table(title: str, rows: dict[str, Measured]) -> None:
  """Milliseconds, and how many times that of the plain copy or read."""
  shown = Rows(title, ("switch", "MB", "switch ms", "copy or read ms", "ratio"))
  for name, (count, switch, plain) in rows.items():
    median, other = statistics.median(switch), statistics.median(plain)
    shown.add(
      name,
      f"{count / 1e6:.2f}",
      f"{1000 * median:.3f}",
      f"{1000 * other:.3f}",
      f"{median / other:.2f}",
    )
  shown.end()


if __name__ == "__main__":
  define_flags()
  command.start(main)
