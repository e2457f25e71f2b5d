"""Weak scaling of joint training: as many images per device on more devices.

  python -m dr_jax.benchmarks.scaling [--processes=1,2,4] [--norm=per_device]
  python -m dr_jax.benchmarks.scaling --devices=1,2,4,8 [--model=resnet50]

On a CPU, real processes on loopback, each with its own core
as far as there are cores; where there are more processes than cores, a warning
says so. With accelerators, one process with some of its devices. Each trains
as the pipeline does: the loop, the layout, the question at every step whether
somebody was asked to stop. Efficiency is images per second and device, of those
that the first count reached.

A cluster that starts the processes itself, and sets their numbers with
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, takes --measure:
the first process prints one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dr_jax import train
from dr_jax.benchmarks import loopback, network
from dr_jax.benchmarks.rows import Rows
from dr_jax.config import TrainConfig
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command, compilation, processes, sharding
from dr_jax.train.gradients import mean_over_devices

_PROCESSES = flags.DEFINE_list("processes", [], "Numbers of processes, on CPU.")
_DEVICES = flags.DEFINE_list("devices", [], "Numbers of devices instead.")
_STEPS = flags.DEFINE_integer("steps", 20, "Timed steps.", lower_bound=1)
_MODEL = flags.DEFINE_enum("model", "resnet8", network.NAMES, "Network.")
_BATCH = flags.DEFINE_integer(
  "batch_size", 32, "Images per device and step.", lower_bound=1
)
_SIZE = flags.DEFINE_integer(
  "image_size", 0, "Side of the images; 0 for the network's.", lower_bound=0
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ("float32", "bfloat16"), "Type of computation."
)
_NORM = flags.DEFINE_enum(
  "norm", "global", sharding.NORMS, "Where batch norms take statistics."
)
_MEASURE = flags.DEFINE_bool(
  "measure", False, "Measure all devices of all processes; print JSON."
)
flags.DEFINE_alias("batch-size", "batch_size")
flags.DEFINE_alias("image-size", "image_size")

# Steps before time counts: compilation, and what the first steps leave behind.
_WARMUP = 3
# How often the sum over devices is timed.
_SUMS = 5


class Speed(NamedTuple):
  """What some devices reached.

  Attributes:
    images_per_second: of all of them together.
    step_seconds: of one step.
    sum_seconds: what the sums of gradients over devices, as many as a step
      makes, take on their own; 0 for one device. Norms add small sums.
  """

  images_per_second: float
  step_seconds: float
  sum_seconds: float


def main():
  """Prints the table, or one measurement."""
  setting = network.Setting(_MODEL.value, _SIZE.value, _DTYPE.value)
  compilation.cache_on_disk()
  if _MEASURE.value:
    processes.initialize()
    layout = sharding.layout(norm=_NORM.value)
    speed = measure(setting, layout, _BATCH.value, _STEPS.value)
    if processes.is_first():
      print(json.dumps(speed._asdict()))
    return
  if _DEVICES.value or not _PROCESSES.value and jax.default_backend() != "cpu":
    unit, counts = "devices", _device_counts()
    run = _on_devices(setting)
  else:
    unit = "processes"
    counts = numbers(unit, _PROCESSES.value or ["1", "2", "4"])
    run = _in_processes
    cores = len(loopback.cores())
    for count in counts:
      if count > cores:
        print(
          f"warning: {count} processes share {cores} cores: this machine "
          "cannot show how they scale",
          file=sys.stderr,
        )
  print_table(setting, _BATCH.value, unit, ((n, run(n)) for n in counts))
  print(environment())


def measure(setting, layout, batch_size, steps) -> Speed:
  """Trains on the devices of a layout; all its processes must call this.

  Args:
    setting: network and images.
    layout: the devices.
    batch_size: images per device.
    steps: how many are timed.
  """
  _, shards = layout.shard
  batch = setting.batch(batch_size * layout.data // shards)
  cpu = jax.default_backend() == "cpu"
  # On a CPU, what compiles in a quarter of the time.
  recipe = TrainConfig(vectorize="sequential" if cpu else "auto", alrs="eta")
  trainer, state = network.trainer(setting.quantized(), recipe, layout)
  interrupted = processes.agreed(lambda: None)

  def trained(state, until):
    loop = train.Loop(
      stage="scaling",
      steps=until,
      labels=setting.bits,
      step=trainer.logged_step,
      batches=[batch] * until,
      interrupted=interrupted,
      put=layout.shard_batch,
      show_progress=False,
    )
    return jax.block_until_ready(loop.run(state))

  state = trained(state, _WARMUP)
  started = time.perf_counter()
  state = trained(state, _WARMUP + steps)
  seconds = (time.perf_counter() - started) / steps
  once = _sum_seconds(layout, state.params) if layout.data > 1 else 0.0
  images = batch_size * layout.data
  return Speed(images / seconds, seconds, once * len(setting.bits))


def _sum_seconds(layout, params) -> float:
  """Median seconds to add up arrays like the parameters, one per device."""
  spread = NamedSharding(layout.mesh, P("data"))

  def stacked(leaf):
    shape = (layout.data, *leaf.shape)
    local = lambda index: np.zeros(shape, leaf.dtype)[index]  # noqa: E731
    return jax.make_array_from_callback(shape, spread, local)

  arrays = jax.tree.map(stacked, params)
  # As the step does: one by one, or together.
  together = layout.norm == "per_device"
  sums = (
    mean_over_devices if together else lambda tree: jax.lax.psum(tree, "data")
  )
  add = jax.jit(
    jax.shard_map(sums, mesh=layout.mesh, in_specs=P("data"), out_specs=P())
  )
  jax.block_until_ready(add(arrays))
  seconds = []
  for _ in range(_SUMS):
    started = time.perf_counter()
    jax.block_until_ready(add(arrays))
    seconds.append(time.perf_counter() - started)
  return statistics.median(seconds)


def print_table(
  setting: network.Setting,
  batch_size: int,
  unit: str,
  speeds: Iterable[tuple[int, Speed]],
) -> None:
  """Prints speeds by number of processes or devices, as they are measured."""
  columns = ("images/s", "each", "efficiency", "step s", "sums of gradients s")
  rows = Rows(
    f"{setting.model}, {batch_size} images of {setting.size}x"
    f"{setting.size}x3 each, bits {setting.bits}",
    (unit, *columns),
    left=0,
  )
  first = None
  for count, speed in speeds:
    each = speed.images_per_second / count
    first = first or each
    rows.add(
      str(count),
      f"{speed.images_per_second:.1f}",
      f"{each:.1f}",
      f"{each / first:.2f}",
      f"{speed.step_seconds:.3f}",
      f"{speed.sum_seconds:.3f}" if count > 1 else "",
    )
  rows.end()


def _in_processes(count) -> Speed:
  """Starts this program in so many processes."""
  arguments = [
    "--measure",
    *(f"--{flag.name}={flag.value}" for flag in (_STEPS, _MODEL, _BATCH)),
    *(f"--{flag.name}={flag.value}" for flag in (_SIZE, _DTYPE, _NORM)),
  ]
  said = loopback.run("dr_jax.benchmarks.scaling", arguments, count)
  return Speed(**json.loads(said.strip().splitlines()[-1]))


def _on_devices(setting) -> Callable[[int], Speed]:
  """Returns what measures so many of this process's devices."""

  def run(count):
    layout = sharding.layout(devices=jax.devices()[:count], norm=_NORM.value)
    return measure(setting, layout, _BATCH.value, _STEPS.value)

  return run


def _device_counts():
  available = jax.device_count()
  default = [str(n) for n in (1, 2, 4, 8) if n <= available]
  counts = numbers("devices", _DEVICES.value or default)
  if max(counts) > available:
    raise ValueError(f"devices must be in 1..{available}, got {max(counts)}")
  return counts


def numbers(name: str, texts: Sequence[str]) -> list[int]:
  """Returns numbers from 1; raises ValueError for anything else."""
  for text in texts:
    if not text.isdecimal() or int(text) < 1:
      raise ValueError(f"{name} must be integers >= 1, got {text}")
  return [int(text) for text in texts]


if __name__ == "__main__":
  command.start(main)
