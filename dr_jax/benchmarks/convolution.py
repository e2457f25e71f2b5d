"""Where a training step's time goes on a CPU: ResNet20's convolutions.

  python -m dr_jax.benchmarks.convolution [--torch] [--batch=128]

Milliseconds of the forward pass and of both gradients, for each shape that
occurs in the network and summed over the network, in several formulations:

  xla        as training programs are compiled (`runtime.compilation.jit`)
  ynnpack    as plain `jax.jit` compiles them
  product    patches gathered by slices, then one matrix product (gradients by
             autodiff)
  torch      oneDNN through PyTorch, channels last
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dr_jax.benchmarks.rows import Rows
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command, compilation

_BATCH = flags.DEFINE_integer("batch", 128, "Images.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed calls of each program.")
_TORCH = flags.DEFINE_bool("torch", False, "Also PyTorch, if installed.")

PASSES = ("forward", "input gradient", "kernel gradient")


class Shape(NamedTuple):
  """A convolution of ResNet20 with 32x32 images, and how often it occurs."""

  count: int
  c_in: int
  c_out: int
  size: int  # height and width of its input
  window: int
  stride: int


SHAPES = (
  Shape(1, 3, 16, 32, 3, 1),
  Shape(6, 16, 16, 32, 3, 1),
  Shape(1, 16, 32, 32, 3, 2),
  Shape(1, 16, 32, 32, 1, 2),
  Shape(5, 32, 32, 16, 3, 1),
  Shape(1, 32, 64, 16, 3, 2),
  Shape(1, 32, 64, 16, 1, 2),
  Shape(5, 64, 64, 8, 3, 1),
)


def main():
  builders: dict[str, Callable[[Any], list[Callable[[], object]]]] = {
    "xla": lambda shape: _jax(shape, _convolve, compilation.jit),
    "ynnpack": lambda shape: _jax(shape, _convolve, jax.jit),
    "product": lambda shape: _jax(shape, _product, compilation.jit),
  }
  if _TORCH.value:
    builders["torch"] = _torch
  rows = Rows(
    f"milliseconds (minimum of {_ROUNDS.value})",
    ("convolution", "times", "pass", *builders),
  )
  totals = np.zeros((len(PASSES), len(builders)))
  for shape in SHAPES:
    times = _minima([build(shape) for build in builders.values()])
    counts = np.full((len(PASSES), 1), shape.count)
    counts[1] *= shape is not SHAPES[0]  # nobody needs the image's gradient
    totals += counts * times
    for name, row in zip(PASSES, times, strict=True):
      first = name == PASSES[0]
      rows.add(
        _describe(shape) if first else "",
        str(shape.count) if first else "",
        name,
        *(f"{1e3 * t:.1f}" for t in row),
      )
  for name, row in zip((*PASSES, "all"), [*totals, totals.sum(0)], strict=True):
    rows.add("network", "", name, *(f"{1e3 * t:.0f}" for t in row))
  rows.end()
  print(environment())


def _minima(programs: list[list[Callable[[], object]]]) -> np.ndarray:
  """Minimum seconds [passes, formulations], all measured in turn."""
  minima = np.full((len(PASSES), len(programs)), np.inf)
  for number in range(_ROUNDS.value + 1):  # the first call compiles
    for column, calls in enumerate(programs):
      for row, call in enumerate(calls):
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
        if number:
          minima[row, column] = min(minima[row, column], seconds)
  return minima


def _describe(shape):
  n = shape.window
  return (
    f"{n}x{n}/{shape.stride}, {shape.c_in} to {shape.c_out}, "
    f"{shape.size}x{shape.size}"
  )


def _arrays(shape):
  rng = np.random.default_rng(0)
  s = shape
  x = rng.normal(size=(_BATCH.value, s.size, s.size, s.c_in))
  w = rng.normal(size=(s.window, s.window, s.c_in, s.c_out))
  return x.astype(np.float32), w.astype(np.float32)


def _convolve(x, w, stride):
  return jax.lax.conv_general_dilated(
    x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _product(x, w, stride):
  height, width = w.shape[:2]
  out = -(-x.shape[1] // stride)
  pad = max((out - 1) * stride + height - x.shape[1], 0)
  x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2),) * 2, (0, 0)))
  end = (out - 1) * stride + 1
  patches = [
    x[:, i : i + end : stride, j : j + end : stride]
    for i in range(height)
    for j in range(width)
  ]
  return jnp.concatenate(patches, -1) @ w.reshape(-1, w.shape[-1])


def _jax(shape, convolve, jit):
  x, w = map(jnp.asarray, _arrays(shape))

  def forward(x, w):
    return convolve(x, w, shape.stride)

  y = jnp.ones_like(jit(forward)(x, w))
  programs = (
    jit(forward),
    jit(lambda x, w: jax.vjp(lambda x: forward(x, w), x)[1](y)),
    jit(lambda x, w: jax.vjp(lambda w: forward(x, w), w)[1](y)),
  )
  return [
    functools.partial(lambda f: jax.block_until_ready(f(x, w)), program)
    for program in programs
  ]


def _torch(shape):
  import torch

  x, w = _arrays(shape)
  last = {"memory_format": torch.channels_last}
  x = torch.tensor(x.transpose(0, 3, 1, 2)).contiguous(**last)
  w = torch.tensor(w.transpose(3, 2, 0, 1)).contiguous(**last)
  stride, padding = (shape.stride,) * 2, (shape.window // 2,) * 2
  forward = lambda: torch.conv2d(x, w, None, stride, padding)  # noqa: E731
  y = torch.ones_like(forward())

  def backward(x_too, w_too):
    torch.ops.aten.convolution_backward(
      y, x, w, None, stride, padding, (1, 1), False, (0, 0), 1,
      (x_too, w_too, False),
    )  # fmt: skip

  return [forward, lambda: backward(True, False), lambda: backward(False, True)]


if __name__ == "__main__":
  command.start(main)
