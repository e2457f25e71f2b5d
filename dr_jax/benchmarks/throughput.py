"""Images per second of a named network's float and joint steps.

Batches are on the devices already: this measures steps, not the reading of
images (`python -m dr_jax.benchmarks.data`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dr_jax.benchmarks.network import Setting, trainer
from dr_jax.benchmarks.peak import fraction_of_peak, peak
from dr_jax.benchmarks.rows import Rows, note, turns
from dr_jax.config import TrainConfig
from dr_jax.runtime.sharding import Layout

MODES = (
  ("alternate", "unroll"),
  ("alternate", "sequential"),
  ("accumulate", "unroll"),
  ("accumulate", "sequential"),
  ("accumulate", "vmap"),
)


class Measured(NamedTuple):
  """A step of one kind.

  Attributes:
    name: of the kind.
    passes: passes of a step.
    seconds: of a step, one for each round; empty if it did not fit in memory.
    first_seconds: of the first step, with compilation.
  """

  name: str
  passes: int
  seconds: list[float]
  first_seconds: float


def modes(
  names: Sequence[str], *, quick: bool = False, vmap: bool = True
) -> list[tuple[str, str]]:
  """Returns pairs of schedule and vectorize.

  Args:
    names: as "schedule/vectorize"; none for all.
    quick: without names, leave out those that compile every bit-width.
    vmap: without names, whether to take those that vectorize by vmap.

  Raises:
    ValueError: for a name that is unknown.
  """
  known = {"/".join(mode): mode for mode in MODES}
  for name in names:
    if name not in known:
      raise ValueError(f"modes must be of {', '.join(known)}, got {name}")
  left_out = ["unroll"] * quick + ["vmap"] * (not vmap)
  return [known[name] for name in names] or [
    mode for mode in MODES if mode[1] not in left_out
  ]


def measure(
  setting: Setting,
  layout: Layout,
  batch_size: int,
  modes: Sequence[tuple[str, str]],
  *,
  rounds: int,
  steps: int,
) -> list[Measured]:
  """Times the float step and joint steps in turn, round after round.

  Args:
    setting: network and images.
    layout: the devices.
    batch_size: images per step, over all devices.
    modes: pairs of schedule and vectorize.
    rounds: how often each is timed.
    steps: how many steps are timed together; their mean counts.

  Raises:
    ValueError: if the devices cannot share the batch evenly.
  """
  if batch_size % layout.data:
    raise ValueError(
      f"batch_size must be a multiple of {layout.data}, the number of devices, "
      f"got {batch_size}"
    )
  batch = layout.shard_batch(setting.batch(batch_size))
  quantized = setting.quantized()
  models = [("float", setting.floating(), MODES[0])]
  for mode in modes:
    models.append((f"joint {' '.join(mode)}", quantized, mode))
  measured, programs = [], []
  for name, model, (schedule, vectorize) in models:
    recipe = TrainConfig(schedule=schedule, vectorize=vectorize, alrs="eta")
    made, state = trainer(model, recipe, layout)
    run = _program(made.step, state, batch)
    seconds = _until_ready(run)
    note(f"{name}: {_said(seconds)}")
    measured.append(Measured(name, len(made.labels), [], seconds or 0.0))
    programs.append(run if seconds is not None else None)
    if seconds is not None:
      run(1)  # Its inputs are where a step leaves them: the last compilation.
  for _ in turns(rounds):
    for row, run in zip(measured, programs, strict=True):
      if run is not None:
        started = time.perf_counter()
        run(steps)
        row.seconds.append((time.perf_counter() - started) / steps)
  return measured


def _said(first):
  return "out of memory" if first is None else f"first step {first:.1f} s"


def _program(step, state, batch) -> Callable[[int], None]:
  """Takes a number of steps, and returns when they are done."""
  states = [state]

  def run(count):
    losses = None
    for _ in range(count):
      states[0], losses = step(states[0], batch)
    jax.block_until_ready((states[0], losses))

  return run


def _until_ready(run) -> float | None:
  """Seconds of the first step, or None if it does not fit in memory."""
  started = time.perf_counter()
  try:
    run(1)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None
  return time.perf_counter() - started


def print_table(
  setting: Setting,
  layout: Layout,
  batch_size: int,
  measured: Sequence[Measured],
) -> None:
  """Prints what was measured, with fractions of the peak where one is known."""
  devices = layout.mesh.devices.flat
  kind, count = devices[0].device_kind, len(devices)
  caption = f"{count} x {kind}, {setting.dtype}"
  best, macs = None, 0
  if devices[0].platform != "cpu":
    best = peak(kind, setting.dtype)
    caption += "; unknown peak"
  if best is not None:
    macs = setting.macs()
    best *= count
    caption = (
      f"{count} x {kind}, {setting.dtype}: {best / 1e12:.0f} TFLOP/s at most; "
      f"of it, 2 x 3 x {macs / 1e9:.2f} G multiply-accumulates per image and "
      "bit-width"
    )
  columns = ["step", "images/s", "median s", "min s", "first step s"]
  rows = Rows(
    f"{setting.model}, batch {batch_size}, "
    f"{setting.size}x{setting.size}x3, bits {setting.bits}\n{caption}",
    columns + ["of peak"] * (best is not None),
  )
  for row in measured:
    if not row.seconds:
      rows.add(row.name, "out of memory")
      continue
    median = float(np.median(row.seconds))
    speed = batch_size / median
    cells = [
      f"{speed:.1f}" if speed < 100 else f"{speed:.0f}",
      f"{median:.4f}",
      f"{min(row.seconds):.4f}",
      f"{row.first_seconds:.1f}",
    ]
    if best is not None:
      fraction = fraction_of_peak(macs, speed, row.passes, best)
      cells.append(f"{100 * fraction:.1f} %")
    rows.add(row.name, *cells)
  rows.end()
