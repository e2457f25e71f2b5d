"""How quantized layers compute: in floats, or in integers with one rescale.

Codes of inputs and kernel meet in one contraction; its accumulators are
integers, and become values by one factor per output channel:

  y[c] = acc[c] * (s_x s_w[c]) + bias[c],   acc = sum of x_codes * w_codes

A backend is a value of pure functions, which layers call without knowing its
name. Each gives the same accumulators, exactly. XLA has no integer convolution
on NVIDIA GPUs; "carrier" and "im2col" serve there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Convolution(NamedTuple):
  """The shape of a convolution, channels last, as lax takes it.

  Attributes:
    strides: of the window.
    padding: (low, high) of every spatial axis.
    lhs_dilation, rhs_dilation: of inputs and kernel.
    groups: feature groups.
    chunks: parts into which input channels are split, so that every sum is
      exact.
  """

  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  lhs_dilation: tuple[int, ...]
  rhs_dilation: tuple[int, ...]
  groups: int = 1
  chunks: int = 1


class Backend(NamedTuple):
  """How codes are contracted.

  Attributes:
    name: in `BACKENDS`.
    convolve: `convolve(x, w, convolution)`, x [n, *size, c_in], w [*window,
      c_in / groups, c_out], integers of 8 or 16 bits; accumulators [n, *size,
      c_out], int32 or exact integers in float32.
    multiply: `multiply(x, w, chunks)`, x [..., c_in], w [c_in, c_out];
      accumulators [..., c_out].
    dtypes: of codes that it takes.
    platforms: on which it runs; () for all.
    exact: sums of integers up to this size are exact in any order.
  """

  name: str
  convolve: Callable[[jax.Array, jax.Array, Convolution], jax.Array]
  multiply: Callable[[jax.Array, jax.Array, int], jax.Array]
  dtypes: tuple[str, ...] = ("int8", "uint8")
  platforms: tuple[str, ...] = ()
  exact: int = 2**31 - 1


class Planes(NamedTuple):
  """Float inputs, and products that read bit-planes of their weights.

  For linear layers whose inputs stay float, at codes that nest: the fewer bits,
  the fewer planes are read (`quant.matmul`).
  """

  name: str = "planes"


def _convolve_integers(x, w, convolution):
  """int8 by int8 to int32; unsigned inputs are shifted by 128 and back."""
  x, offset = _signed(x)
  if offset:
    # What is padded stands for zero: every window has the same offset.
    x, convolution = _padded(x, convolution, -offset)
  acc = _lax_convolve(x, w, convolution, preferred_element_type=jnp.int32)
  return _shifted_back(acc, w, offset)


def _multiply_integers(x, w, chunks):
  x, offset = _signed(x)
  return _shifted_back(_dot(x, w, jnp.int32), w, offset)


def _convolve_patches(x, w, convolution):
  """One int8 product with gathered patches; depthwise, a sum over taps."""
  x, offset = _signed(x)
  x, convolution = _padded(x, convolution, -offset)
  taps = list(_taps(x, w, convolution))
  *_, inner, features = w.shape
  if convolution.groups > 1:
    if inner == 1:
      acc = _depthwise(taps, w, convolution.groups)
    else:
      acc = _lax_convolve(x, w, convolution, preferred_element_type=jnp.int32)
  else:
    patches = taps[0] if len(taps) == 1 else jnp.concatenate(taps, -1)
    acc = _dot(patches, w.reshape(-1, features), jnp.int32)
  return _shifted_back(acc, w, offset)


def _depthwise(taps, w, groups):
  """Every tap times its weight of each channel, added up."""
  kernel = w.astype(jnp.int32).reshape(len(taps), groups, -1)
  products = (
    tap.astype(jnp.int32)[..., None]
    * weights.reshape((1,) * (tap.ndim - 1) + weights.shape)
    for tap, weights in zip(taps, kernel, strict=True)
  )
  acc = functools.reduce(jnp.add, products)
  return acc.reshape(*acc.shape[:-2], -1)


def _convolve_carriers(x, w, convolution):
  """Integers in floats: a float convolution whose sums are exact."""
  carrier = _carrier()

  def part(x, w):
    return _lax_convolve(x, w, convolution, preferred_element_type=jnp.float32)

  x, w = x.astype(carrier), w.astype(carrier)
  return _sum_of_chunks(part, x, w, convolution.chunks)


def _multiply_carriers(x, w, chunks):
  carrier = _carrier()

  def part(x, w):
    return _dot(x, w, jnp.float32)

  return _sum_of_chunks(part, x.astype(carrier), w.astype(carrier), chunks)


def _sum_of_chunks(part, x, w, chunks):
  """The sum of part(x, w) over pieces of the input channels."""
  if chunks == 1:
    return part(x, w)
  pieces = zip(
    jnp.array_split(x, chunks, -1),
    jnp.array_split(w, chunks, -2),
    strict=True,
  )
  parts = (part(a, b).astype(jnp.int32) for a, b in pieces)
  return functools.reduce(jnp.add, parts)


BACKENDS: dict[str, Backend | Planes | None] = {
  # Kernel and inputs are decoded, and the float layer computes.
  "float": None,
  "integer": Backend(
    "integer",
    _convolve_integers,
    _multiply_integers,
    platforms=("cpu", "tpu"),
  ),
  "im2col": Backend("im2col", _convolve_patches, _multiply_integers),
  "carrier": Backend(
    "carrier",
    _convolve_carriers,
    _multiply_carriers,
    dtypes=("int8", "uint8", "int16"),
    exact=2**24,
  ),
  "planes": Planes(),
}


def get(name: str) -> Backend | Planes | None:
  """Returns a backend by name; None for "float".

  Raises:
    ValueError: for an unknown name.
  """
  if name not in BACKENDS:
    raise ValueError(f"backend must be one of {tuple(BACKENDS)}, got {name!r}")
  return BACKENDS[name]


def _signed(x):
  """int8 codes, and what was subtracted from unsigned ones."""
  if x.dtype != jnp.uint8:
    return x, 0
  return (x ^ jnp.uint8(128)).view(jnp.int8), 128


def _shifted_back(acc, w, offset):
  """Adds what the offset took from every output channel."""
  if not offset:
    return acc
  sums = w.astype(jnp.int32).sum(tuple(range(w.ndim - 1)))
  return acc + (offset * sums).reshape((1,) * (acc.ndim - 1) + (-1,))


def _padded(x, convolution, value):
  """x padded and dilated, and the convolution that is left to do."""
  spatial = zip(convolution.padding, convolution.lhs_dilation, strict=True)
  config = [(low, high, step - 1) for (low, high), step in spatial]
  rank = len(config)
  left = convolution._replace(
    padding=((0, 0),) * rank, lhs_dilation=(1,) * rank
  )
  if left == convolution:
    return x, left
  filled = x.dtype.type(value)
  return lax.pad(x, filled, [(0, 0, 0), *config, (0, 0, 0)]), left


def _lax_convolve(x, w, convolution, **kwargs):
  *spatial, inner, outer = range(x.ndim)
  places = (0, outer, *(axis + 1 for axis in spatial))
  numbers = lax.ConvDimensionNumbers(places, (outer, inner, *spatial), places)
  return lax.conv_general_dilated(
    x,
    w,
    convolution.strides,
    convolution.padding,
    lhs_dilation=convolution.lhs_dilation,
    rhs_dilation=convolution.rhs_dilation,
    dimension_numbers=numbers,
    feature_group_count=convolution.groups,
    # Tensor cores take eight bits of a carrier as they are.
    precision=lax.Precision.DEFAULT,
    **kwargs,
  )


def _taps(x, w, convolution):
  """For every position of the window, the inputs that it sees."""
  window, dilation = np.array(w.shape[:-2]), np.array(convolution.rhs_dilation)
  last = np.array(x.shape[1:-1]) - (window - 1) * dilation
  for position in np.ndindex(*window):
    start = position * dilation
    yield lax.slice(
      x,
      (0, *start, 0),
      (x.shape[0], *(start + last), x.shape[-1]),
      (1, *convolution.strides, 1),
    )


def _dot(x, w, dtype):
  contracted = (((x.ndim - 1,), (0,)), ((), ()))
  return lax.dot_general(x, w, contracted, preferred_element_type=dtype)


def _carrier() -> Any:
  """bfloat16 holds integers up to 256, where products of it are fast."""
  return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
