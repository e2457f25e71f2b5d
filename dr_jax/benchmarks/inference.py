"""Latency and throughput of a deployed network, by backend and bit-width.

  python -m dr_jax.benchmarks.inference [--model=resnet20] [--batches=1,32]

Programs take turns in one process: the float network in float32 and bfloat16,
and the network of stored codes with every backend that runs here. Weights are
random, which changes no time. One program serves all bit-widths of a backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from dr_jax import nn
from dr_jax.benchmarks import network
from dr_jax.benchmarks.network import Setting
from dr_jax.benchmarks.rows import Rows, prepared, turns
from dr_jax.benchmarks.timing import in_turn, ratio
from dr_jax.runtime import command

FLAGS = flags.FLAGS

_FLOATS = ("float32", "bfloat16")


def define_flags() -> None:
  """Defines what the command takes; some names are also those of others."""
  flags.DEFINE_enum("model", "resnet20", network.NAMES, "Network.")
  flags.DEFINE_integer(
    "image_size", 0, "Height and width of an image; 0 for the network's own.", 0
  )
  flags.DEFINE_list("batches", ["1", "32"], "Images per call.")
  flags.DEFINE_list("bits", ["8", "4", "2"], "Bit-widths, highest first.")
  flags.DEFINE_list(
    "backends",
    list(nn.BACKENDS),
    "Backends; those that cannot run are left out.",
  )
  flags.DEFINE_integer("rounds", 11, "Timed rounds.", 1)


class Program(NamedTuple):
  """One row: what computes, and how to call it.

  Attributes:
    name: dtype of the float network, or backend.
    bits: None for the float network.
    call: logits of images.
  """

  name: str
  bits: int | None
  call: Callable[[np.ndarray], jax.Array]


def programs(setting: Setting, backends: Sequence[str]) -> list[Program]:
  """The float network twice, then every backend at every bit-width."""
  found = [
    Program(dtype, None, _call(_float(setting, dtype))) for dtype in _FLOATS
  ]
  stored = nn.deployed.assemble(
    setting.floating(), nn.deployed.parts_of(setting.quantized())
  )
  for name in backends:
    if nn.supports(stored, name):
      nn.set_backend(stored, name)
      call = _call(stored)
      for index, bits in enumerate(setting.bits):
        found.append(Program(name, bits, _at(call, index)))
  return found


def measure(
  found: Sequence[Program], images: np.ndarray, rounds: int
) -> np.ndarray:
  """Seconds of one call, [programs, rounds]; they take turns."""
  for program in found:
    at = "" if program.bits is None else f" at {program.bits} bits"
    call = functools.partial(program.call, images)
    prepared(f"{program.name}{at}, batch {len(images)}", call)
  calls = [functools.partial(program.call, images) for program in found]
  return in_turn(calls, turns(rounds))


def print_table(
  setting: Setting,
  found: Sequence[Program],
  measured: dict[int, np.ndarray],
) -> None:
  """Medians, and medians of ratios to float32 in the same round."""
  columns = ["program", "bits"]
  for batch in measured:
    unit = "ms" if batch == 1 else "images/s"
    columns += [f"batch {batch}: {unit}", "of float32"]
  rows = Rows(
    f"{setting.model}, {setting.size}x{setting.size}x3, "
    f"{jax.devices()[0].device_kind}",
    columns,
  )
  for number, program in enumerate(found):
    cells = []
    for batch, seconds in measured.items():
      median = float(np.median(seconds[number]))
      speed = f"{1e3 * median:.2f}" if batch == 1 else f"{batch / median:.0f}"
      cells += [speed, f"{ratio(seconds[number], seconds[0]):.2f}"]
    bits = "" if program.bits is None else str(program.bits)
    rows.add(program.name, bits, *cells)
  rows.end()


def fastest(found: Sequence[Program], seconds: np.ndarray) -> str:
  """What backend "auto" takes: the smallest median over its bit-widths."""
  medians = np.median(seconds, 1)
  names = [p.name for p in found if p.bits is not None]
  return min(
    names,
    key=lambda name: min(
      m for p, m in zip(found, medians, strict=True) if p.name == name
    ),
  )


def main() -> None:
  """Measures and prints."""
  bits = network.bit_widths(FLAGS.bits)
  setting = Setting(FLAGS.model, FLAGS.image_size, bits=bits)
  found = programs(setting, FLAGS.backends)
  measured = {
    batch: measure(found, setting.batch(batch)["image"], FLAGS.rounds)
    for batch in map(int, FLAGS.batches)
  }
  print_table(setting, found, measured)
  for batch, seconds in measured.items():
    print(f"auto at batch {batch}: {fastest(found, seconds)}")


def _float(setting, dtype):
  model = setting._replace(dtype=dtype).floating()
  model.eval()
  return model


def _call(model: nnx.Module) -> Callable[..., jax.Array]:
  """A compiled call (images, index); a float network ignores the index."""
  split = nn.functional(model)

  @jax.jit
  def call(params, batch_stats, index, images):
    return split.apply(params, batch_stats, index, images)[0]

  def of_images(images, index=0):
    index = jnp.int32(index)
    return call(split.params, split.batch_stats, index, images)

  return of_images


def _at(call, index):
  return lambda images: call(images, index)


if __name__ == "__main__":
  define_flags()
  command.start(main)
