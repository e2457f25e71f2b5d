"""Times of a Hessian-vector product, in gradients, on a float ResNet.

  python -m dr_jax.benchmarks.hessian [--batch=128] [--plain_jit] [...]

All with respect to the kernels, as a trace takes them, with batch norm in
inference mode, one probe at a time. Everything is measured in one process, in
turn, round after round, so that a noisy machine disturbs all alike: the ratio
is the median over rounds of seconds over the gradient's of the same round.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from absl import flags
from flax import nnx

from dr_jax import hessian, models, nn
from dr_jax.benchmarks.rows import Rows, prepared, turns
from dr_jax.benchmarks.timing import in_turn, ratio
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command, compilation

_BATCH = flags.DEFINE_integer("batch", 128, "Images per gradient.")
_SIZE = flags.DEFINE_integer("size", 32, "Height and width of an image.")
_DEPTH = flags.DEFINE_integer("depth", 20, "Depth of the ResNet, 6 n + 2.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed calls of each program.")
_PLAIN = flags.DEFINE_bool("plain_jit", False, "Compile by jax.jit as it is.")


class Timed(NamedTuple):
  """One program under measurement."""

  name: str
  run: Callable[[], object]
  compile_seconds: float
  temporary_bytes: int


def main():
  loss, kernels, rest = _network()
  keys = iter(jax.random.split(jax.random.key(0), len(kernels)))
  probe = {
    name: jax.random.rademacher(next(keys), kernel.shape, kernel.dtype)
    for name, kernel in kernels.items()
  }
  rows = [_timed("gradient", jax.grad(loss), kernels, *rest)]
  for mode in hessian.MODES:

    def product(kernels, probe, *rest, mode=mode):
      return hessian.hvp(loss, kernels, probe, *rest, mode=mode)

    rows.append(_timed(mode.replace("_", " "), product, kernels, probe, *rest))
  calls = [row.run for row in rows]
  _report(rows, in_turn(calls, turns(_ROUNDS.value)))


def _network():
  """Returns loss(kernels, rest, batch) of the network, and its arguments."""
  model = models.ResNet(_DEPTH.value, num_classes=10, rngs=nnx.Rngs(0))
  network = nn.functional(model)
  leaves, structure = jax.tree.flatten(network.params)
  kinds = jax.tree.leaves(network.param_labels)
  kernels, vectors = {}, {}
  for number, (leaf, kind) in enumerate(zip(leaves, kinds, strict=True)):
    (kernels if kind == "weight" else vectors)[str(number)] = leaf

  def loss(kernels, rest, batch):
    vectors, batch_stats = rest
    both = {**kernels, **vectors}
    params = structure.unflatten(both[str(n)] for n in range(len(leaves)))
    logits, _ = network.apply(params, batch_stats, 0, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )
    return losses.mean()

  shape = (_BATCH.value, _SIZE.value, _SIZE.value, 3)
  image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  label = np.arange(_BATCH.value, dtype=np.int32) % 10
  batch = jax.device_put({"image": image, "label": label})
  return loss, kernels, ((vectors, network.batch_stats), batch)


def _timed(name: str, function: Callable, *arguments) -> Timed:
  jit: Callable = jax.jit if _PLAIN.value else compilation.jit
  started = time.perf_counter()
  program = prepared(name, jit(function).lower(*arguments).compile)
  seconds = time.perf_counter() - started

  run = functools.partial(program, *arguments)
  jax.block_until_ready(run())
  memory = program.memory_analysis().temp_size_in_bytes
  return Timed(name, run, seconds, memory)


def _report(rows, seconds):
  table = Rows(
    f"ResNet{_DEPTH.value}, batch {_BATCH.value}, "
    f"{_SIZE.value}x{_SIZE.value}x3",
    (
      "program",
      "median s",
      "min s",
      "of gradient",
      "per second",
      "temporary MiB",
      "compile s",
    ),
  )
  for row, taken in zip(rows, seconds, strict=True):
    median = float(np.median(taken))
    table.add(
      row.name,
      f"{median:.3f}",
      f"{min(taken):.3f}",
      f"{ratio(taken, seconds[0]):.2f}",
      f"{1 / median:.2f}",
      f"{row.temporary_bytes / 2**20:.0f}",
      f"{row.compile_seconds:.1f}",
    )
  table.end()
  print(environment())


if __name__ == "__main__":
  command.start(main)
