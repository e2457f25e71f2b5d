"""Times of a training step: float, one bit-width, and all jointly.

  python -m dr_jax.benchmarks.joint_step [--torch] [--batch=32] [...]

Everything is measured in one process, in turn, round after round, so that a
noisy machine disturbs all alike: compare ratios. Reported per program: the
median and the least seconds of a step, the compiled program's temporary
memory, seconds to compile, and the number of compilations.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from rich.console import Console
from rich.table import Table

from dr_jax import models, nn, quant, train
from dr_jax.pipeline import environment

_BATCH = flags.DEFINE_integer("batch", 128, "Images per step.")
_SIZE = flags.DEFINE_integer("size", 32, "Height and width of an image.")
_DEPTH = flags.DEFINE_integer("depth", 20, "Depth of the ResNet, 6 n + 2.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each program.")
_BITS = flags.DEFINE_list("bits", ["8", "6", "4", "2"], "Bit-widths.")
_TORCH = flags.DEFINE_bool("torch", False, "Also PyTorch, if installed.")
_VMAP = flags.DEFINE_bool("vmap", True, "Also vectorize='vmap'.")

MODES = (
  ("alternate", "unroll"),
  ("alternate", "sequential"),
  ("accumulate", "unroll"),
  ("accumulate", "sequential"),
  ("accumulate", "vmap"),
)


class Timed(NamedTuple):
  """One program under measurement."""

  name: str
  step: Callable[[], None]
  seconds: list[float]
  compile_seconds: float
  compilations: int
  temporary_bytes: int | None


def main(argv):
  del argv
  # `lower().compile()` for the memory and the first call are one compilation.
  jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
  bits = tuple(map(int, _BITS.value))
  rows = [_jax("float", (32,), None, "alternate", "unroll")]
  for b in bits:
    rows.append(_jax(f"single {b}", (b,), (b,), "alternate", "unroll"))
  for schedule, vectorize in MODES:
    if vectorize != "vmap" or _VMAP.value:
      rows.append(
        _jax(f"joint {schedule} {vectorize}", bits, bits, schedule, vectorize)
      )
  if _TORCH.value:
    rows += _torch(bits)
  for _ in range(_ROUNDS.value):
    for row in rows:
      started = time.perf_counter()
      row.step()
      row.seconds.append(time.perf_counter() - started)
  _report(rows, bits)


def _jax(name, bits, candidates, schedule, vectorize) -> Timed:
  """Builds a step, and measures its compilation and its memory."""
  image = np.random.default_rng(0).normal(
    size=(_BATCH.value, _SIZE.value, _SIZE.value, 3)
  )
  batch = {
    "image": image.astype(np.float32),
    "label": (np.arange(_BATCH.value) % 10).astype(np.int32),
  }
  model = models.ResNet(_DEPTH.value, num_classes=10, rngs=nnx.Rngs(0))
  if candidates is not None:
    model = nn.quantize(
      model,
      weight=quant.double_rounding(candidates),
      activation=quant.lsq_activation(candidates),
      sample=batch["image"],
    )
  network = nn.functional(model)
  optimizer = train.make_optimizer(
    "sgd", kinds=network.kinds, weight_decay=5e-5
  )
  step = train.make_step(
    network,
    bits,
    optimizer,
    optax.constant_schedule(1e-4),
    schedule=schedule,
    vectorize=vectorize,
    alrs="relative" if candidates else "none",
  )
  state = [train.init_state(network, optimizer, jax.random.key(0))]

  def run():
    state[0], losses = step(state[0], batch)
    jax.block_until_ready((state[0], losses))

  compilations = []

  def listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compilations.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  started = time.perf_counter()
  memory = _temporary_bytes(step, state[0], batch)
  first = time.perf_counter() - started
  run()
  run()
  jax.monitoring.unregister_event_duration_listener(listen)
  return Timed(name, run, [], first, len(compilations), memory)


def _temporary_bytes(step, state, batch) -> int | None:
  """Peak temporary memory of the largest program of a step."""
  if hasattr(step, "lower"):
    compiled = step.lower(state, batch).compile()
  elif hasattr(step, "lower_per_bits"):
    compiled = step.lower_per_bits(state, batch).compile()
  else:
    return None
  return compiled.memory_analysis().temp_size_in_bytes


def _torch(bits) -> list[Timed]:
  """Our own PyTorch program of the same step."""
  from dr_jax.benchmarks import torch_step

  program = torch_step.build(_BATCH.value, _SIZE.value, _DEPTH.value, bits)
  steps: dict[str, Any] = {"torch float": program.float_step}
  for b in bits:
    steps[f"torch single {b}"] = lambda b=b: program.single_step(b)
  steps["torch joint alternate"] = program.joint_step
  for step in steps.values():
    step()
  return [Timed(name, step, [], 0, 0, None) for name, step in steps.items()]


def _report(rows, bits):
  median = {row.name: float(np.median(row.seconds)) for row in rows}
  singles = sum(median[f"single {b}"] for b in bits)
  table = Table(
    title=f"ResNet{_DEPTH.value}, batch {_BATCH.value}, "
    f"{_SIZE.value}x{_SIZE.value}x3, bits {bits}"
  )
  for column in (
    "step",
    "median s",
    "least s",
    "of singles",
    "temporary MiB",
    "compile s",
    "compilations",
  ):
    table.add_column(column, justify="left" if column == "step" else "right")
  for row in rows:
    memory = row.temporary_bytes
    joint = row.name.startswith("joint")
    table.add_row(
      row.name,
      f"{median[row.name]:.3f}",
      f"{min(row.seconds):.3f}",
      f"{median[row.name] / singles:.2f}" if joint else "",
      f"{memory / 2**20:.0f}" if memory is not None else "",
      f"{row.compile_seconds:.1f}" if row.compilations else "",
      str(row.compilations) if row.compilations else "",
    )
  console = Console(width=120)
  console.print(table)
  slowest = max(median[f"single {b}"] for b in bits)
  console.print(f"single / float: {slowest / median['float']:.2f}")
  if "torch float" in median:
    ours = median["joint alternate unroll"]
    theirs = median["torch joint alternate"]
    console.print(f"joint, ours / torch: {ours / theirs:.2f}")
    console.print(
      f"float, ours / torch: {median['float'] / median['torch float']:.2f}"
    )
  default = train.resolve_vectorize("auto", "alternate")
  console.print(f"default on {jax.default_backend()}: vectorize={default!r}")
  console.print(environment())


if __name__ == "__main__":
  app.run(main)
