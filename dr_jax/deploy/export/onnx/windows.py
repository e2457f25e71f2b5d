"""A convolution as a product: its windows as rows, by one Gather.

ONNX Runtime computes in integers every product, but a convolution only where
its output is 8-bit codes. Where sums must come out as floats, Gather lays the
windows out as rows [places, window * c_in], and one product follows.

A product of few channels leaves the machine idle, and a Gather of short pieces
takes as long as the product. So images of few channels are folded first: two
neighbors on the last spatial axis become one place with twice the channels, on
which the same convolution has a kernel of other size with zeros in it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

# Channels up to which folding pays off; measured in ONNX Runtime 1.32.
_FEW_CHANNELS = 16


class Windows(NamedTuple):
  """How to compute a convolution of x [batch, *size, c_in] as a product.

  Attributes:
    padding: (low, high) of every spatial axis of x, with codes of zero.
    places: what padded x is reshaped to, without the batch: [places, channels].
    index: places of all taps of all windows, flat; None where rows are places.
    rows: shape of the rows, without the batch: [*size, taps * channels].
    fold: how many neighbors on the last spatial axis are one place.
  """

  padding: tuple[tuple[int, int], ...]
  places: tuple[int, int]
  index: np.ndarray | None
  rows: tuple[int, ...]
  fold: int


def windows(
  size: tuple[int, ...], kernel: tuple[int, ...], params: dict[str, Any]
) -> Windows:
  """Returns the windows of a convolution without groups.

  Args:
    size: of the image, without batch and channels.
    kernel: shape [*window, c_in, c_out].
    params: of `conv_general_dilated`.
  """
  strides, dilations = params["window_strides"], params["rhs_dilation"]
  padding = tuple(params["padding"])
  size = tuple(
    n + low + high for n, (low, high) in zip(size, padding, strict=True)
  )
  *window, channels, _ = kernel
  plain = set(strides) == set(dilations) == {1}
  fold = 2 if plain and _is_foldable(size, kernel) else 1
  window[-1] = (window[-1] + fold - 1) // fold
  size = (*size[:-1], size[-1] // fold)
  channels *= fold
  taps = [
    np.arange((n - (k - 1) * d - 1) // s + 1)[:, None] * s + np.arange(k) * d
    for n, k, s, d in zip(size, window, strides, dilations, strict=True)
  ]
  counts = [len(t) for t in taps]
  width = math.prod(window) * channels
  rows_are_places = width == channels and counts == [*size]
  return Windows(
    padding,
    (math.prod(size), channels),
    None if rows_are_places else _flat(taps, size),
    (*counts, width),
    fold,
  )


def _is_foldable(size, kernel):
  *_, window, channels, _ = kernel
  odd = window > 1 and window % 2 == 1
  return 1 < channels <= _FEW_CHANNELS and odd and size[-1] % 2 == 0


def _flat(taps, size):
  """Positions in the flat image of taps [count, k] on every axis."""
  dims = len(size)
  flat = np.zeros((1,) * (2 * dims), np.int64)
  for axis, (positions, n) in enumerate(zip(taps, size, strict=True)):
    shape = [1] * (2 * dims)
    shape[axis], shape[dims + axis] = positions.shape
    flat = flat * n + positions.reshape(shape)
  return flat.reshape(-1).astype(np.int32)
