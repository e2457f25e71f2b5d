"""Kernels that a training step launches: float, one bit-width, and jointly.

  python -m dr_jax.benchmarks.launches [--depth=20] [--batch=128]
  python -m dr_jax.benchmarks.launches --target_config=h100_sxm.txtpb

Small networks on a GPU wait for launches, not for arithmetic, and launches can
be counted where there is no GPU: with `--target_config` the steps are compiled
for the GPU of that file and not run. That takes the packages
`jax-cuda12-plugin`, `jax-cuda12-pjrt` (of JAX's version) and
`nvidia-cuda-nvcc-cu12`, and XLA's description of the GPU, a file of its
directory `xla/backends/gpu/target_config/specs`. Without it, the kernels are
those of this backend; XLA:CPU fuses less.

Two tables: what kind of kernels there are, and what part of a step asked for
them; a kernel belongs to the part of its last operation. The last column
divides the alternate joint step by as many float steps as it has bit-widths.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from flax import nnx
from jax.experimental import topologies

from dr_jax import models, nn, quant, train
from dr_jax.benchmarks import hlo, network
from dr_jax.benchmarks.rows import Rows, prepared
from dr_jax.config import TrainConfig
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command

_BATCH = flags.DEFINE_integer("batch", 128, "Images per step.", lower_bound=1)
_SIZE = flags.DEFINE_integer(
  "size", 32, "Height and width of an image.", lower_bound=1
)
_DEPTH = flags.DEFINE_integer("depth", 20, "Depth of the ResNet, 6 n + 2.")
_BITS = flags.DEFINE_list("bits", ["8", "6", "4", "2"], "Bit-widths.")
_TARGET = flags.DEFINE_string(
  "target_config", "", "Description of a GPU to compile for instead."
)

# The first that matches a frame, from the innermost one on.
_PARTS = (
  ("scales and ALRS", r"train/alrs\.py|_weighted_by_alrs|_update_scale"),
  ("metrics", r"train/measured\.py|runtime/tree\.py, stack"),
  (
    "optimizer",
    r"train/optimizer\.py|optax/transforms/|apply_gradients|, _add$",
  ),
  ("norms", r"nn/norm\.py|nn/normalization\.py"),
  ("quantizers", r"dr_jax/quant/"),
  ("network", r"gradients\.py, _loss"),
)
PARTS = (
  *("network, forward", "network, backward", "norms", "quantizers"),
  *("scales and ALRS", "optimizer", "metrics", "layouts", "rest"),
)


def part_of(kernel: hlo.Kernel) -> str:
  """Returns which one of PARTS asked for a kernel."""
  for frame in kernel.frames:
    for part, pattern in _PARTS:
      if re.search(pattern, frame):
        way = "backward" if kernel.backward else "forward"
        return f"{part}, {way}" if part == "network" else part
  return "rest" if kernel.frames else "layouts"


def main():
  bits = network.bit_widths(_BITS.value)
  compiled = _compiler()
  steps = {
    "float": (None, "alternate"),
    f"single {bits[0]}": (bits[:1], "alternate"),
    **{f"joint {schedule}": (bits, schedule) for schedule in train.SCHEDULES},
  }
  found = {
    name: hlo.kernels(prepared(name, lambda s=step: compiled(_trainer(*s))))
    for name, step in steps.items()
  }
  title = (
    f"ResNet{_DEPTH.value}, batch {_BATCH.value}, "
    f"{_SIZE.value}x{_SIZE.value}x3, bits {bits}, unrolled"
  )
  kinds = {name: [k.kind for k in kernels] for name, kernels in found.items()}
  parts = {name: list(map(part_of, kernels)) for name, kernels in found.items()}
  print_counts(title, "kind", hlo.KINDS, kinds, len(bits))
  print_counts("Of these", "part", PARTS, parts, len(bits))
  print(environment())


def print_counts(
  title: str,
  column: str,
  rows: Sequence[str],
  found: Mapping[str, Sequence[str]],
  passes: int,
) -> None:
  """Prints how often each of `rows` is found in every step.

  Args:
    title: of the table.
    column: what the rows are.
    rows: what is counted.
    found: by the name of a step, what each of its kernels is; the float step
      first, the alternate joint step third.
    passes: of the joint step.
  """
  ratio = f"alternate / {passes} float"
  table = Rows(title, (column, *found, ratio))
  counts = {name: collections.Counter(of) for name, of in found.items()}
  for row in (*rows, "all"):
    numbers = [c[row] if row != "all" else c.total() for c in counts.values()]
    whole = passes * numbers[0]
    share = f"{numbers[2] / whole:.2f}" if whole else ""
    table.add(row, *map(str, numbers), share)
  table.end()


def _trainer(bits, schedule):
  """Trainer, state and batch of a step of Double Rounding, or of float."""
  setting = network.Setting("resnet20", _SIZE.value)
  batch = setting.batch(_BATCH.value)
  model = models.ResNet(_DEPTH.value, num_classes=10, rngs=nnx.Rngs(0))
  recipe = TrainConfig(schedule=schedule, vectorize="unroll")
  if bits is not None:
    model = nn.quantize(
      model,
      weight=quant.double_rounding(bits),
      activation=quant.lsq_activation(bits),
      sample=setting.batch(2)["image"],
    )
    recipe = dataclasses.replace(recipe, alrs="eta")
  return *network.trainer(model, recipe), batch


def _compiler() -> Callable[..., Any]:
  """Returns what compiles a step and returns its text."""
  if not _TARGET.value:
    return lambda made: made[0].lower(*made[1:]).compile().as_text()
  jax.devices()  # Finds plugins.
  topology = topologies.get_topology_desc(
    platform="cuda",
    target_config=pathlib.Path(_TARGET.value).read_text("utf-8"),
    # Of one process with one device.
    topology="1x1x1",
  )
  device = jax.sharding.SingleDeviceSharding(topology.devices[0])

  def compiled(made):
    trainer, *arguments = made
    # Not with the options of this backend.
    step = jax.jit(trainer.program.__wrapped__, donate_argnums=0)
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      arguments,
    )
    # Tuning kernels takes the device.
    options: dict[str, bool | str] = {"xla_gpu_autotune_level": "0"}
    return step.lower(*shapes).compile(compiler_options=options).as_text()

  return compiled


if __name__ == "__main__":
  command.start(main)
