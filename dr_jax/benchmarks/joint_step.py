"""Times of a training step: float, one bit-width, and all jointly.

  python -m dr_jax.benchmarks.joint_step [--torch] [--batch=32] [...]
  python -m dr_jax.benchmarks.joint_step --torch --torch_compile
      --steps_per_call=16
  python -m dr_jax.benchmarks.joint_step --method=adabits,lsq [...]
  python -m dr_jax.benchmarks.joint_step --model=resnet50 [--dtype=bfloat16]
      [--batch-size=256] [--image-size=224] [--modes=alternate/unroll,...]

The second form is for a GPU: it adds the alternate joint step several times in
one call, as `train.steps_per_call`, and the same program of PyTorch compiled
(`torch.compile`, mode "reduce-overhead").

The third form times the steps of methods (`quant.RECIPES`, "all" for every
one) compared with Double Rounding's: the passes that a step of the method
makes, with its schedule and distillation.

Everything is measured in one process, in turn, round after round, so that a
noisy machine disturbs all alike: compare ratios. Reported per program: the
median and the minimum seconds of a step, the compiled program's temporary
memory, seconds to compile, and the number of compilations.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx

from dr_jax import models, nn, quant, train
from dr_jax.benchmarks import network, throughput
from dr_jax.benchmarks.compilations import recorded
from dr_jax.benchmarks.rows import Rows, note, prepared, turns
from dr_jax.benchmarks.throughput import MODES
from dr_jax.benchmarks.timing import in_turn, ratio
from dr_jax.config import TrainConfig, from_dict, quantizers
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command, compilation, sharding

_BATCH = flags.DEFINE_integer("batch", 128, "Images per step.", lower_bound=1)
_SIZE = flags.DEFINE_integer(
  "size",
  0,
  "Height and width of an image; 0 for 32, or 224 with a network for ImageNet.",
  lower_bound=0,
)
_DEPTH = flags.DEFINE_integer("depth", 20, "Depth of the ResNet, 6 n + 2.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each program.")
_BITS = flags.DEFINE_list("bits", ["8", "6", "4", "2"], "Bit-widths.")
_TORCH = flags.DEFINE_bool("torch", False, "Also PyTorch, if installed.")
_TORCH_COMPILE = flags.DEFINE_bool(
  "torch_compile", False, "With --torch: also its steps compiled."
)
_STEPS_PER_CALL = flags.DEFINE_integer(
  "steps_per_call",
  1,
  "Also the alternate joint step, as many times in one call.",
  lower_bound=1,
)
_METHODS = flags.DEFINE_list("method", [], "Methods to time instead.")
_VMAP = flags.DEFINE_bool("vmap", True, "Also vectorize='vmap'.")
_MODEL = flags.DEFINE_enum(
  "model", None, network.NAMES, "Network to time on all devices instead."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ("float32", "bfloat16"), "Type of its computation."
)
_MODES = flags.DEFINE_list(
  "modes",
  [],
  "Its joint steps, as schedule/vectorize; by default all, but on a CPU none "
  "that takes minutes to compile.",
)
for _alias, _name in (
  ("batch_size", "batch"),
  ("batch-size", "batch"),
  ("image_size", "size"),
  ("image-size", "size"),
):
  flags.DEFINE_alias(_alias, _name)

_OURS = "double_rounding"


class Timed(NamedTuple):
  """One program under measurement."""

  name: str
  step: Callable[[], None]
  seconds: list[float]
  compile_seconds: float
  compilations: int
  temporary_bytes: int | None
  steps: int = 1  # In one call of `step`.


def main():
  if _TORCH_COMPILE.value and not _TORCH.value:
    raise ValueError("torch_compile must not be set without --torch")
  if _MODEL.value:
    _network(network.bit_widths(_BITS.value))
    return
  # `lower().compile()` for the memory and the first call are one compilation.
  jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
  bits = network.bit_widths(_BITS.value)
  if _METHODS.value:
    _methods(bits)
    return
  rows = [_jax("float", None, "alternate", "unroll")]
  for b in bits:
    rows.append(_jax(f"single {b}", (b,), "alternate", "unroll"))
  for schedule, vectorize in MODES:
    if vectorize != "vmap" or _VMAP.value:
      rows.append(
        _jax(f"joint {schedule} {vectorize}", bits, schedule, vectorize)
      )
  if (count := _STEPS_PER_CALL.value) > 1:
    name = f"joint alternate unroll, {count} a call"
    rows.append(_jax(name, bits, "alternate", "unroll", count))
  if _TORCH.value:
    rows += _torch(bits)
  _time(rows)
  _report(rows, bits)


def _time(rows):
  calls = [row.step for row in rows]
  seconds = in_turn(calls, turns(_ROUNDS.value))
  for row, taken in zip(rows, seconds, strict=True):
    row.seconds.extend(taken / row.steps)


def _network(bits):
  """Times the steps of a named network, and prints images per second."""
  for name, given in (
    ("method", _METHODS.value),
    ("torch", _TORCH.value),
    ("steps_per_call", _STEPS_PER_CALL.value > 1 and _STEPS_PER_CALL.value),
  ):
    if given:
      raise ValueError(f"{name} must not be set with --model, got {given}")
  compilation.cache_on_disk()
  layout = sharding.layout()
  setting = network.Setting(str(_MODEL.value), _SIZE.value, _DTYPE.value, bits)
  cpu = jax.default_backend() == "cpu"
  measured = throughput.measure(
    setting,
    layout,
    _BATCH.value,
    throughput.modes(_MODES.value, quick=cpu, vmap=_VMAP.value),
    rounds=_ROUNDS.value,
    # An accelerator works while the next step is being sent.
    steps=1 if cpu else 10,
  )
  throughput.print_table(setting, layout, _BATCH.value, measured)
  print(environment())


def _methods(bits):
  """Times the steps of methods, and prints ratios to Double Rounding's."""
  names = quant.RECIPES if _METHODS.value == ["all"] else _METHODS.value
  rows = [_method(name, bits) for name in dict.fromkeys([_OURS, *names])]
  _time(rows)
  table = Rows(
    _title(bits), ("method", "median s", "min s", f"of {_OURS}", "compile s")
  )
  for row in rows:
    table.add(
      row.name,
      f"{np.median(row.seconds):.3f}",
      f"{min(row.seconds):.3f}",
      # Of the same round: what disturbs one row disturbs its neighbors.
      f"{ratio(row.seconds, rows[0].seconds):.2f}",
      f"{row.compile_seconds:.1f}",
    )
  table.end()
  print(environment())


def _method(name, bits) -> Timed:
  """A step of a method, in the last phase of its curriculum."""
  own = quant.RECIPES[name].bits
  values = {"method": name, "quant": {"bits": own or bits}}
  config = from_dict(values)
  weight, activation = quantizers(config.quant)
  recipe, norm = config.train, config.quant.norm
  for phase in train.CURRICULA[recipe.curriculum].phases[-1:]:
    norm = phase.norm or norm
    sampling = phase.sampling or recipe.sampling
    recipe = dataclasses.replace(recipe, sampling=sampling)
  model = nn.quantize(
    models.ResNet(_DEPTH.value, num_classes=10, rngs=nnx.Rngs(0)),
    weight=weight,
    activation=activation,
    sample=_batch()["image"],
    norm=norm,
  )
  return _timed(name, model, recipe)


def _jax(name, candidates, schedule, vectorize, steps=1) -> Timed:
  """A step of Double Rounding, or of the float network."""
  model = models.ResNet(_DEPTH.value, num_classes=10, rngs=nnx.Rngs(0))
  recipe = TrainConfig(schedule=schedule, vectorize=vectorize)
  if candidates is not None:
    model = nn.quantize(
      model,
      weight=quant.double_rounding(candidates),
      activation=quant.lsq_activation(candidates),
      sample=_batch()["image"],
    )
    recipe = dataclasses.replace(recipe, alrs="relative")
  return _timed(name, model, recipe, steps)


def _batch():
  image = np.random.default_rng(0).normal(
    size=(_BATCH.value, _size(), _size(), 3)
  )
  return {
    "image": image.astype(np.float32),
    "label": (np.arange(_BATCH.value) % 10).astype(np.int32),
  }


def _timed(name, model, recipe: TrainConfig, steps: int = 1) -> Timed:
  """Builds a step, and measures its compilation and its memory."""
  # As PyTorch's: what the input pipeline does meanwhile is not measured here.
  batch = jax.device_put(_batch())
  trainer, start = network.trainer(model, recipe)
  state = [start]
  given: Any = batch if steps == 1 else (batch,) * steps

  def run():
    state[0], losses = trainer.step(state[0], given)
    jax.block_until_ready((state[0], losses))

  memory = None
  with recorded() as compilations:
    started = time.perf_counter()
    if steps == 1:
      compiled = prepared(name, trainer.lower(state[0], batch).compile)
      analysis = compiled.memory_analysis()
      memory = analysis.temp_size_in_bytes if analysis else 0
    else:
      prepared(name, run)
    first = time.perf_counter() - started
    run()
    run()
  count = len(compilations.compile)
  return Timed(name, run, [], first, count, memory, steps)


def _torch(bits) -> list[Timed]:
  """Our own PyTorch program of the same step."""
  from dr_jax.benchmarks import torch_step

  def build():
    return torch_step.build(_BATCH.value, _size(), _DEPTH.value, bits)

  program = build()
  steps: dict[str, Any] = {"torch float": program.float_step}
  for b in bits:
    steps[f"torch single {b}"] = lambda b=b: program.single_step(b)
  steps["torch joint alternate"] = program.joint_step
  if _TORCH_COMPILE.value and (lacks := torch_step.lacks()):
    note(f"torch compile: left out, it needs {lacks}")
  elif _TORCH_COMPILE.value:
    compiled = build().compiled()
    steps["torch compile float"] = compiled.float_step
    steps["torch compile joint alternate"] = compiled.joint_step
  for name, step in steps.items():
    # Twice, since CUDA graphs are recorded in the second call.
    prepared(name, lambda step=step: (step(), step()))
  return [Timed(name, step, [], 0, 0, None) for name, step in steps.items()]


def _size():
  return _SIZE.value or 32


def _title(bits):
  return (
    f"ResNet{_DEPTH.value}, batch {_BATCH.value}, "
    f"{_size()}x{_size()}x3, bits {bits}"
  )


def _report(rows, bits):
  median = {row.name: float(np.median(row.seconds)) for row in rows}
  singles = sum(median[f"single {b}"] for b in bits)
  table = Rows(
    _title(bits),
    (
      "step",
      "median s",
      "min s",
      "of float",
      "of singles",
      "temporary MiB",
      "compile s",
      "compilations",
    ),
  )
  for row in rows:
    memory = row.temporary_bytes
    joint = row.name.startswith("joint")
    table.add(
      row.name,
      f"{median[row.name]:.3f}",
      f"{min(row.seconds):.3f}",
      f"{ratio(row.seconds, rows[0].seconds):.2f}",
      f"{median[row.name] / singles:.2f}" if joint else "",
      f"{memory / 2**20:.0f}" if memory is not None else "",
      f"{row.compile_seconds:.1f}" if row.compilations else "",
      str(row.compilations) if row.compilations else "",
    )
  table.end()
  slowest = max(median[f"single {b}"] for b in bits)
  print(f"single / float: {slowest / median['float']:.2f}")
  for theirs in ("torch", "torch compile"):
    if f"{theirs} float" in median:
      for name, seconds in median.items():
        if name.startswith("joint alternate unroll"):
          times = seconds / median[f"{theirs} joint alternate"]
          print(f"{name}, ours / {theirs}: {times:.2f}")
      times = median["float"] / median[f"{theirs} float"]
      print(f"float, ours / {theirs}: {times:.2f}")
  print(environment())


if __name__ == "__main__":
  command.start(main)
