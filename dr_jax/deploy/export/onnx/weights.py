"""Weight codes in a file: stored once as they are, arranged by nodes.

Initializers hold the codes [*window, c_in, c_out] of a layer and nothing made
of them. How a product or a convolution wants them is nodes, which ONNX Runtime
computes once, when it loads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from dr_jax.deploy.export.onnx.builder import Builder
from dr_jax.deploy.export.onnx.steps import Weight

# How the codes of a weight come into the graph: the name of an int8 tensor.
Source = Callable[[Builder, Weight], str]

# Inputs that share a scale in MatMulNBits; here all of a channel do.
BLOCK = 128


def as_int8(builder: Builder, weight: Weight) -> str:
  """One byte for each code."""
  return builder.constant(weight.codes, _name(weight))


def as_int4(builder: Builder, weight: Weight) -> str:
  """Half a byte for each code where 4 bits hold all of them."""
  return _narrow(builder, weight, ml_dtypes.int4, 4)


def as_int2(builder: Builder, weight: Weight) -> str:
  """A quarter of a byte where 2 bits hold them, half of one where 4 bits do."""
  if _fits(weight.codes, 2):
    return _narrow(builder, weight, ml_dtypes.int2, 2)
  return as_int4(builder, weight)


PACKED = (as_int4, as_int2)
SOURCES: dict[str, Source] = {
  "int8": as_int8,
  "int4": as_int4,
  "int2": as_int2,
}


def blocks(codes: np.ndarray) -> tuple[np.ndarray, int]:
  """Codes as MatMulNBits packs them: [c_out, blocks, bytes], and their bits.

  Codes [c_in, c_out] become unsigned, in blocks of `BLOCK` inputs, which are
  filled up with the code of zero.
  """
  bits = 4 if _fits(codes, 4) else 8
  zero = 2 ** (bits - 1)
  padded = np.pad(codes, ((0, -len(codes) % BLOCK), (0, 0)))
  unsigned = (padded.T.astype(np.int16) + zero).astype(np.uint8)
  unsigned = unsigned.reshape(codes.shape[1], -1, BLOCK)
  if bits == 4:
    unsigned = unsigned[..., ::2] | unsigned[..., 1::2] << 4
  return unsigned, bits


def multiplied(builder: Builder, codes: str, factor: np.ndarray) -> str:
  """codes * factor [c_out], which int8 must hold."""
  if np.all(factor == 1):
    return codes
  wide = builder.cast(codes, np.int32)
  product = builder.add("Mul", wide, builder.constant(factor.astype(np.int32)))
  return builder.cast(product, np.int8)


def ordered(builder: Builder, codes: str, order: Sequence[int]) -> str:
  """Codes with their axes in an order."""
  return builder.add("Transpose", codes, perm=list(order))


def flat(
  builder: Builder, codes: str, shape: tuple[int, ...], fold: int
) -> str:
  """Codes [*window, c_in, c_out] as a matrix for the rows of `windows`.

  Args:
    shape: of the codes.
    fold: neighbors on the last window axis whose outputs are computed together,
      each by the codes shifted by one place.
  """
  *window, c_in, c_out = shape
  if fold > 1:
    axis = len(window) - 1
    moved = []
    for place in range(fold):
      pads = np.zeros((2, len(shape)), np.int64)
      pads[:, axis] = place, fold - 1 - place
      padded = builder.add("Pad", codes, builder.constant(pads.reshape(-1)))
      new = builder.constant(np.array([len(shape) - 1]))
      moved.append(builder.add("Unsqueeze", padded, new))
    codes = builder.add("Concat", *moved, axis=len(shape) - 1)
    window[axis] += fold - 1
  rows = int(np.prod([*window, c_in]))
  target = builder.constant(np.array([rows, fold * c_out]))
  return builder.add("Reshape", codes, target)


def largest_factor(codes: np.ndarray, largest_input: int) -> np.ndarray:
  """What codes [..., c_out] can be multiplied by, per channel; at least 1.

  int8 holds the products, and int16 two of them times the largest input code:
  processors without VNNI add in that, and saturate.
  """
  size = np.abs(codes.astype(np.int32)).reshape(-1, codes.shape[-1]).max(0)
  limit = min(127, 2**15 // (2 * largest_input))
  return np.maximum(limit // np.maximum(size, 1), 1)


def _narrow(builder, weight, dtype, bits):
  if not _fits(weight.codes, bits):
    return as_int8(builder, weight)
  codes = builder.constant(weight.codes.astype(dtype), _name(weight))
  return builder.cast(codes, np.int8)


def _fits(codes, bits):
  half = 2 ** (bits - 1)
  return -half <= int(codes.min()) and int(codes.max()) < half


def _name(weight):
  return f"{weight.layer}/weight_codes"
