"""How many multiply-accumulates a second this device makes of one layer."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp

from dr_jax import nn

# Multiply-accumulates of a call, and seconds of calls: a second in all.
_CALL = 2**28
_SECONDS = 0.3


def macs_per_second(layer: nn.LayerRow, dtype: str) -> float:
  """Measures the product of a layer, forward and alone.

  Args:
    layer: its kernel, and how many outputs it makes of an example.
    dtype: in which it computes.
  """
  outputs = max(layer.macs // layer.parameters, 1)
  batch = max(min(_CALL // max(layer.macs, 1), 256), 1)
  *window, inner, channels = layer.shape
  if len(window) == 2:
    side = max(math.isqrt(outputs), 1)
    x = jnp.ones((batch, side, side, inner), dtype)
    kernel = jnp.ones(layer.shape, dtype)
    multiply = jax.jit(_convolve)
    macs = x.size // inner * layer.parameters
  else:
    x = jnp.ones((batch * outputs, layer.parameters // channels), dtype)
    kernel = jnp.ones((x.shape[1], channels), dtype)
    multiply = jax.jit(jnp.matmul)
    macs = x.shape[0] * layer.parameters
  jax.block_until_ready(multiply(x, kernel))
  calls, started = 0, time.perf_counter()
  while (seconds := time.perf_counter() - started) < _SECONDS or not calls:
    jax.block_until_ready(multiply(x, kernel))
    calls += 1
  return macs * calls / seconds


def _convolve(x, kernel):
  dimensions = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=dimensions
  )
