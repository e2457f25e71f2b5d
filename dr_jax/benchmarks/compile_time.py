"""Seconds to compile a joint step, as networks and bit-widths grow.

  python -m dr_jax.benchmarks.compile_time [--model=resnet8,resnet20]
      [--bits=84,8642] [--modes=alternate/unroll,...] [--image_size=32]

Of each network, each set of bit-widths and each mode: CPU seconds, of all
threads, in which JAX traces, lowers and compiles the programs of a first step,
and of that step as a whole, its few images included; and seconds on a clock.
Every row begins without what others have traced or compiled; nothing comes from
a cache on disk. The last column says which mode `vectorize="auto"` is on this
backend.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx

from dr_jax import nn, quant, train
from dr_jax.benchmarks import network, throughput
from dr_jax.benchmarks.compilations import Compilations, cpu_seconds, recorded
from dr_jax.benchmarks.rows import Rows
from dr_jax.config import TrainConfig
from dr_jax.pipeline.summary import environment
from dr_jax.quant.core.checks import one_of
from dr_jax.runtime import command

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines what the command takes; some names are also those of others."""
  flags.DEFINE_list("model", ["resnet8", "resnet20"], "Networks.")
  flags.DEFINE_list("bits", ["84", "8642"], "Sets of bit-widths.")
  flags.DEFINE_list(
    "modes", [], "Joint steps, as schedule/vectorize; by default all."
  )
  flags.DEFINE_integer("image_size", 32, "Height and width of an image.", 1)
  flags.DEFINE_integer("batch_size", 8, "Images per step.", 1)
  flags.DEFINE_alias("image-size", "image_size")
  flags.DEFINE_alias("batch-size", "batch_size")


class FirstStep(NamedTuple):
  """What a first step takes.

  Attributes:
    layers: quantized layers of the network.
    passes: of the step.
    compilations: of all programs of the step.
    cpu_seconds: of all threads, with the step itself.
    seconds: the same on a clock.
    auto: whether this is the mode that "auto" stands for.
  """

  layers: int
  passes: int
  compilations: Compilations
  cpu_seconds: float
  seconds: float
  auto: bool


def main() -> None:
  """Measures and prints."""
  for name in FLAGS.model:
    one_of("model", name, network.NAMES)
  size, count = FLAGS.image_size, FLAGS.batch_size
  settings = [
    network.Setting(name, size, bits=numbers(text))
    for name in FLAGS.model
    for text in FLAGS.bits
  ]
  modes = throughput.modes(FLAGS.modes)
  jax.config.update("jax_enable_compilation_cache", False)
  rows = Rows(
    f"{size}x{size}x3, batch {count}",
    (
      *("network", "joint step", "layers", "passes", "programs"),
      *("trace", "lower", "compile", "CPU s", "s", "auto"),
    ),
    left=2,
  )
  for setting in settings:
    model, batch = setting.quantized(), setting.batch(count)
    for schedule, vectorize in modes:
      jax.clear_caches()
      first = measure(model, batch, schedule, vectorize)
      rows.add(setting.model, f"{schedule} {vectorize}", *cells(first))
  rows.end()
  print(environment())


def measure(
  model: nnx.Module, batch: dict[str, np.ndarray], schedule: str, vectorize: str
) -> FirstStep:
  """Makes the first step of a quantized network in a mode.

  Args:
    model: the network, which stays as it is.
    batch: its images and labels.
    schedule, vectorize: how; not "auto".
  """
  recipe = TrainConfig(schedule=schedule, vectorize=vectorize, alrs="eta")
  trainer, state = network.trainer(model, recipe)
  started, cpu_started = time.perf_counter(), cpu_seconds()
  with recorded() as compilations:
    jax.block_until_ready(trainer.step(state, batch))
  seconds = time.perf_counter() - started
  cpu = cpu_seconds() - cpu_started
  layers, passes = len(nn.layer_table(model)), len(trainer.labels)
  auto = train.resolve_vectorize("auto", schedule, layers=layers, passes=passes)
  return FirstStep(
    layers, passes, compilations, cpu, seconds, auto == vectorize
  )


def cells(first: FirstStep) -> list[str]:
  """What the table says of a first step."""
  return [
    str(first.layers),
    str(first.passes),
    str(len(first.compilations.compile)),
    *(f"{sum(seconds):.1f}" for seconds in first.compilations),
    f"{first.cpu_seconds:.1f}",
    f"{first.seconds:.1f}",
    "yes" if first.auto else "",
  ]


def numbers(text: str) -> tuple[int, ...]:
  """Returns bit-widths of one digit each; raises ValueError for others.

  >>> numbers("842")
  (8, 4, 2)
  """
  if not text.isdecimal():
    raise ValueError(f"bits must be like 8642, got {text!r}")
  return quant.check_bits(list(map(int, text)))


if __name__ == "__main__":
  define_flags()
  command.start(main)
