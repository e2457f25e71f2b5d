"""Products of one row with weights of few bits, compared with float products.

  python -m dr_jax.benchmarks.planes [--shapes=4096x4096,4096x11008]

`quant.matmul` at every bit-width, by each backend that this device has, and
the same product with weights in bfloat16 and in float32: minimum of the
rounds, all in turn. GB/s are those of what the product has to move
(`quant.matmul_bytes`), whatever else a program moves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from dr_jax import quant
from dr_jax.benchmarks.rows import Rows
from dr_jax.pipeline.summary import environment
from dr_jax.quant.planes import measure
from dr_jax.runtime import command

_SHAPES = flags.DEFINE_list(
  "shapes", None, "Of kernels, KxN; by default larger ones on an accelerator."
)
_BITS = flags.DEFINE_multi_integer("bits", [8, 4, 2], "Of 8 stored ones.")
_BATCH = flags.DEFINE_integer("batch", 1, "Rows of inputs.", lower_bound=1)
_ROUNDING = flags.DEFINE_enum(
  "rounding", "half_up", ["half_up", "floor"], "How lower codes are made."
)
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Of all in turn.", lower_bound=1)

STORED_BITS = 8
SMALL = ("1024x1024", "1024x2752")
LARGE = ("4096x4096", "4096x11008")


class Row(NamedTuple):
  """One product: seconds of a call, and the bytes that it has to move."""

  name: str
  seconds: float
  moved: int


def main():
  """Prints a table for each shape."""
  on_cpu = jax.default_backend() == "cpu"
  shapes = [
    _parsed(shape) for shape in _SHAPES.value or (SMALL if on_cpu else LARGE)
  ]
  for k, n in shapes:
    rows = measured(
      (_BATCH.value, k, n), _BITS.value, _ROUNDING.value, _ROUNDS.value
    )
    print_table(rows, f"{_BATCH.value} x {k} by {k} x {n}")
  print(environment())


def measured(
  shape: tuple[int, int, int], bits: Sequence[int], rounding: str, rounds: int
) -> list[Row]:
  """Measures products of shape (m, k, n), floats first."""
  m, k, n = shape
  x = jax.random.normal(jax.random.key(0), (m, k), jnp.float32)
  w = jax.random.normal(jax.random.key(1), (k, n), jnp.float32)
  half = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  calls = {"bfloat16": _call(jnp.dot, *half), "float32": _call(jnp.dot, x, w)}
  moved = {
    name: jnp.dtype(name).itemsize * (m * k + k * n + m * n) for name in calls
  }
  method = quant.double_rounding((STORED_BITS, 2), rounding=rounding)
  stored = method.encode(method.init(w), w)
  weights = quant.to_planes(stored["codes"], STORED_BITS), stored["scale"]
  for b in bits:
    for backend in _backends():
      name = f"{b} bits, {backend}"
      calls[name] = _call(_planes(b, rounding, backend), half[0], weights)
      moved[name] = quant.matmul_bytes(
        shape, b, jnp.bfloat16, stored_bits=STORED_BITS, rounding=rounding
      )
  for call in calls.values():  # Compiles.
    jax.block_until_ready(call())
  seconds = measure.seconds(calls, rounds)
  repeats = _repeats()
  return [Row(name, seconds[name] / repeats, moved[name]) for name in calls]


def print_table(rows: Sequence[Row], title: str) -> None:
  """Prints a table; ratios are of the float rows, which come first."""
  found = Rows(
    title, ("weights", "ms", "MB", "GB/s", "of bfloat16", "of float32")
  )
  half, single = rows[:2]
  for row in rows:
    found.add(
      row.name,
      f"{1e3 * row.seconds:.4f}",
      f"{1e-6 * row.moved:.2f}",
      f"{1e-9 * row.moved / row.seconds:.1f}",
      f"{row.seconds / half.seconds:.2f}",
      f"{row.seconds / single.seconds:.2f}",
    )
  found.end()


def _parsed(shape):
  found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
  if found is None:
    raise ValueError(f"shapes must be like 4096x11008, got {shape!r}")
  return int(found[1]), int(found[2])


def _backends():
  return ("xla", "pallas") if jax.default_backend() == "gpu" else ("xla",)


def _repeats():
  # On a CPU a product takes longer than a call, and loops run on one core.
  return 1 if jax.default_backend() == "cpu" else 100


def _call(product, x, weights):
  run = jax.jit(measure.repeated(product, _repeats()))
  return lambda: run(x, weights)


def _planes(bits, rounding, backend):
  def product(x, weights):
    planes, scale = weights
    return quant.matmul(
      x, planes, scale, bits, rounding=rounding, backend=backend
    )

  return product


if __name__ == "__main__":
  command.start(main)
