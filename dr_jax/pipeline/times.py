"""About how long a run takes, before it does.

  seconds = cost macs examples / (multiply-accumulates a second)

macs being those of one example; examples those of all epochs and all passes of
a step; cost 1 for a forward pass, 3 for one forward and two back, 6 for a
product with the Hessian (`pipeline.work`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dr_jax import nn
from dr_jax.nn.layer_table import aligned
from dr_jax.pipeline import throughput
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.phases import Phase, pass_count, step_count
from dr_jax.pipeline.work import GRADIENT, Work

_TRAINING = ("phase", "steps", "passes", "operations", "about")
_WORK = ("stage", "what", "how many", "examples", "operations", "about")


class Speed(NamedTuple):
  """How fast a run's devices are at its network.

  Attributes:
    macs: multiply-accumulates of one example.
    macs_per_second: of one device.
    devices: that training is spread over.
    assumed: in words, what an estimate assumes.
  """

  macs: int
  macs_per_second: float
  devices: int
  assumed: str

  def seconds(self, examples: int, cost: int, devices: int = 1) -> float:
    """Returns the seconds of so many examples at so many forward passes."""
    return cost * self.macs * examples / self.macs_per_second / devices


def measure(run: RunContext, table: nn.LayerTable, macs: int) -> Speed:
  """Measures the devices; takes a few seconds.

  Args:
    run: the run.
    table: of the layers that are quantized.
    macs: multiply-accumulates of one example, in all layers.
  """
  speed = throughput.measure(
    table, batch=run.config.data.batch_size, dtype=run.config.model.dtype
  )
  devices = run.layout.mesh.size
  where = "one device" if devices == 1 else f"{devices} devices"
  rate = speed.macs_per_second
  return Speed(
    macs,
    rate,
    devices,
    f"products on {where}, if all are as fast as those measured now "
    f"({speed.products} kinds, {100 * speed.share:.0f} % of the work in "
    f"quantized layers), {2 * rate / 1e9:.3g} billion operations a second; "
    "rounding, norms, data and compilation come on top",
  )


def of_examples(speed: Speed, examples: int = 10**6) -> str:
  """Says how long training takes where the number of examples is unknown."""
  seconds = speed.seconds(examples, GRADIENT, speed.devices)
  return (
    f"training at one bit-width takes about {duration(seconds)} for a million "
    f"examples: {speed.assumed}"
  )


def of_training(
  run: RunContext, speed: Speed, phases: Sequence[Phase], *, seeds: int = 1
) -> str:
  """Says the steps, operations and about the seconds of every phase."""
  rows, total = [_TRAINING], 0.0
  for phase in phases:
    steps, passes = step_count(run, phase), pass_count(phase)
    examples = steps * run.config.data.batch_size * passes
    seconds = speed.seconds(examples, GRADIENT, speed.devices)
    total += seconds * seeds
    operations = _operations(speed, examples, GRADIENT)
    rows.append(
      (phase.stage, f"{steps:,}", str(passes), operations, duration(seconds))
    )
  return (
    f"{len(run.data.train):,} examples to train on, "
    f"{len(run.data.test):,} to test on; training:\n{aligned(rows)}\n"
    f"about {duration(total)}{_for(seeds)}: {speed.assumed}"
  )


def of_work(
  run: RunContext, speed: Speed, works: Sequence[Work], *, seeds: int = 1
) -> str:
  """Says what comes besides training: how much of it, and about how long.

  Args:
    run: the run; one of its processes does all of this.
    speed: of its devices.
    works: of all stages.
    seeds: how often all is repeated.
  """
  rows, least, most = [_WORK], 0.0, 0.0
  for work in works:
    low, high = (
      speed.seconds(count * work.examples, work.cost, run.local.mesh.size)
      for count in (work.least, work.most)
    )
    least, most = least + low, most + high
    rows.append(
      (
        work.stage,
        work.what,
        _span(f"{work.least:,}", f"{work.most:,}"),
        f"{work.examples:,}",
        _operations(speed, work.most * work.examples, work.cost),
        _span(duration(low), duration(high)),
      )
    )
  total = _span(duration(seeds * least), duration(seeds * most))
  return (
    "besides training, at least to at most, operations at most:\n"
    f"{aligned(rows)}\nabout {total}{_for(seeds)}"
  )


def _for(seeds):
  return f" for {seeds} seeds" if seeds > 1 else ""


def _operations(speed, examples, cost):
  """A multiply-accumulate counts as two."""
  return f"{2.0 * cost * speed.macs * examples:.2g}"


def _span(low, high):
  return low if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
  """A time in words.

  >>> duration(0.01), duration(90), duration(200_000)
  ('0.01 s', '1.5 min', '2.3 days')
  """
  for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
    if seconds >= size:
      return f"{seconds / size:.2g} {unit}"
  return f"{seconds:.2g} s"
