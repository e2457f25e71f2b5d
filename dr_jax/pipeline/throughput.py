"""How fast this device is at the products that training consists of."""

from __future__ import annotations

import collections
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dr_jax import nn
from dr_jax.runtime import compilation

# Products that are measured, multiply-accumulates forward in a call of one, and
# seconds of its calls: a few seconds in all.
_PRODUCTS = 4
_CALL = 2**29
_SECONDS = 0.2


class Throughput(NamedTuple):
  """What was measured.

  Attributes:
    macs_per_second: multiply-accumulates, forward and back.
    products: how many different products were measured.
    share: of the multiply-accumulates of the layers, those of these products.
  """

  macs_per_second: float
  products: int
  share: float


def measure(table: nn.LayerTable, *, batch: int, dtype: str) -> Throughput:
  """Measures the layers' products with the most work, forward and back.

  Args:
    table: the layers.
    batch: examples of a step; fewer are multiplied if that takes long.
    dtype: in which they compute.
  """
  work: dict[nn.LayerRow, int] = collections.Counter()
  for row in table:
    same = row._replace(name="", bits=0, signed=None)
    work[same] += max(row.macs, 1)  # A lookup has none.
  largest = collections.Counter(work).most_common(_PRODUCTS)
  macs = sum(count for _, count in largest)
  seconds = sum(
    count / _macs_per_second(row, batch, dtype) for row, count in largest
  )
  share = macs / sum(work.values())
  return Throughput(macs / seconds, len(largest), share)


def _macs_per_second(layer, batch, dtype):
  """Of one layer, with its gradients by input and kernel."""
  outputs = max(layer.macs // layer.parameters, 1)
  batch = max(min(batch, _CALL // max(layer.macs, 1)), 1)
  *window, inner, channels = layer.shape
  if len(window) == 2:
    side = max(math.isqrt(outputs), 1)
    # One channel for each output is a depthwise convolution.
    groups = channels if inner == 1 else 1
    x = (batch, side * layer.stride, side * layer.stride, inner * groups)
    kernel, outputs = layer.shape, side**2
  else:
    groups, kernel = 1, (layer.parameters // channels, channels)
    x = (batch * outputs, kernel[0])

  def loss(x, kernel):
    if len(window) != 2:
      return jnp.sum(jnp.square(x @ kernel))
    y = jax.lax.conv_general_dilated(
      x,
      kernel,
      (layer.stride,) * 2,
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )
    return jnp.sum(jnp.square(y))

  gradient = compilation.jit(jax.grad(loss, (0, 1)))
  arrays = jnp.ones(x, dtype), jnp.ones(kernel, dtype)
  jax.block_until_ready(gradient(*arrays))
  calls, started = 0, time.perf_counter()
  while (seconds := time.perf_counter() - started) < _SECONDS or not calls:
    jax.block_until_ready(gradient(*arrays))
    calls += 1
  return 3 * batch * outputs * layer.parameters * calls / seconds
