"""Codes from integer sums, by the arithmetic of ONNX Runtime's QLinearConv.

A network rounds once, code = clip(round(gain * sum + offset), low, high), and
QLinearConv has a float32 multiplier and an integer bias for each channel:

  code = clip(round(multiplier * (factor * sum + bias)) + pivot, low, high)

where `factor` multiplies the weight codes, so that a unit of bias is finer.
Both are steps of an integer, and equal where their thresholds are: the smallest
sums with at least code k. A factor and a bias turn each threshold into an
interval of multipliers that keep it; the multiplier chosen lies in all of them,
or in as many as possible.

In the plane of sums and codes, factor and bias are a point through which the
line multiplier * (factor * sum + bias) + pivot has to go, near the line wanted,
and the multiplier is its slope. The pivot puts this point outside of the codes,
where a small turn moves all thresholds by about the same.

References:
  ONNX, QLinearConv; ONNX Runtime, mlas/lib/quantize.cpp: requantization
  multiplies in float32 and rounds half to even.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# The largest pivot: as a zero point, uint8 holds it for signed codes too.
_LARGEST_PIVOT = 127
# Biases on each side of the wanted line, and factors; more gain nothing.
_BIASES, _FACTORS = 4, 16
# How often codes are expected: by e less with every eighth of the largest.
_FALL = 8.0
# float32 holds all integers up to here; sums and biases stay far inside int32.
_EXACT, _LARGEST = 2**24, 2**30


class Requantization(NamedTuple):
  """What QLinearConv needs for the codes of a layer.

  Attributes:
    factor: int32 [c_out], what weight codes are multiplied by.
    bias: int32 [c_out].
    multiplier: float32 [c_out].
    pivot: the code where factor * sum + bias is zero, in 0..127.
    exact: bool [c_out], whether all sums within reach have their codes.
  """

  factor: np.ndarray
  bias: np.ndarray
  multiplier: np.ndarray
  pivot: int
  exact: np.ndarray


def requantization(
  gain: np.ndarray,
  offset: np.ndarray,
  codes: tuple[int, int],
  sums: np.ndarray,
  largest_factor: np.ndarray,
) -> Requantization | None:
  """Returns the arithmetic that gives code = round(gain * sum + offset).

  Args:
    gain, offset: float64 [c_out].
    codes: the smallest and the largest, of 8 bits.
    sums: int [2, c_out], the smallest and the largest within reach.
    largest_factor: int [c_out], at least 1.

  Returns:
    None where a bias or a sum would leave int32.
  """
  low, high = codes
  # Lines through zero are kept by a bias of zero.
  pivot = min(2 * high - low + 1, _LARGEST_PIVOT) if np.any(offset) else 0
  channels = []
  for g, o, ends, largest in zip(
    gain, offset, sums.T, largest_factor, strict=True
  ):
    # A gain below zero is one above zero of the negative sums.
    sign = -1 if g < 0 else 1
    line = _Line(abs(g), o, low, high)
    ends = np.sort(sign * ends)
    found = _channel(line, ends, pivot, min(largest, _FACTORS))
    if found is None:
      return None
    factor, bias, multiplier, exact = found
    # The factor stays positive.
    turn = sign if factor else 1
    channels.append((factor, turn * bias, turn * multiplier, exact))
  factor, bias, multiplier, exact = zip(*channels, strict=True)
  return Requantization(
    np.array(factor, np.int32),
    np.array(bias, np.int32),
    np.array(multiplier, np.float32),
    pivot,
    np.array(exact),
  )


class _Line(NamedTuple):
  """code = clip(round(gain * sum + offset), low, high), with a gain >= 0."""

  gain: float
  offset: float
  low: int
  high: int

  def codes(self, sums):
    """What the sums give."""
    rounded = np.rint(self.gain * sums + self.offset)
    return np.clip(rounded, self.low, self.high)

  def thresholds(self, codes):
    """The smallest sums that give at least these codes."""
    sums = np.floor((codes - 0.5 - self.offset) / self.gain) - 1
    for _ in range(3):  # half to even decides a tie
      sums += np.rint(self.gain * sums + self.offset) < codes
    return sums


class _Points(NamedTuple):
  """The sums on both sides of each threshold.

  Attributes:
    codes: of the thresholds, [points].
    sums: within reach.
    reaches: whether the sum gives at least the code.
  """

  codes: np.ndarray
  sums: np.ndarray
  reaches: np.ndarray


def _channel(line, ends, pivot, largest):
  """Factor, bias, multiplier of one channel, and whether they are exact."""
  first, last = line.codes(ends)
  if first == last:
    return 0, first - pivot, 1.0, True
  points = _points(line, ends)
  factor, bias = _candidates(line, ends, points, pivot, largest)
  if not len(factor):
    return None
  row, multiplier = _best(points, factor, bias, pivot)
  factor, bias = factor[row], bias[row]
  sums = (factor * points.sums + bias).astype(np.float32)
  codes = np.clip(np.rint(sums * multiplier) + pivot, line.low, line.high)
  return factor, bias, multiplier, np.all(codes == line.codes(points.sums))


def _points(line, ends):
  codes = np.arange(line.low + 1, line.high + 1)
  sums = line.thresholds(codes)
  above, below = np.maximum(sums, ends[0]), np.minimum(sums - 1, ends[1])
  sums = np.concatenate([above, below])
  reaches = np.arange(len(sums)) < len(above)
  within = (ends[0] <= sums) & (sums <= ends[1])
  return _Points(np.tile(codes, 2)[within], sums[within], reaches[within])


def _candidates(line, ends, points, pivot, largest):
  """Factors and biases, pairs near the line that the arithmetic can hold."""
  factor = np.arange(1, largest + 1)[:, None]
  bias = np.floor(factor * ((line.offset - pivot) / line.gain))
  bias = bias + np.arange(1 - _BIASES, 1 + _BIASES)
  factor, bias = (x.reshape(-1) for x in np.broadcast_arrays(factor, bias))

  def largest_of(sums):
    return np.abs(factor[:, None] * sums + bias[:, None]).max(1)

  holds = np.maximum(largest_of(ends), np.abs(bias)) < _LARGEST
  holds &= (factor == 1) | (largest_of(points.sums) <= _EXACT)
  return factor[holds], bias[holds]


def _best(points, factor, bias, pivot):
  """The number of the best pair, and the multiplier, float32.

  A point demands side * multiplier * (factor * sum + bias) > side * (code - 1/2
  - pivot). From a multiplier of zero, where points with a positive right side
  are wrong, each changes once: where the sides are equal, if anywhere.
  """
  size = np.abs(points.codes)
  weight = np.exp(-_FALL * size / size.max())
  side = np.where(points.reaches, 1, -1)
  right = side * (points.codes - 0.5 - pivot)
  sums = side * (factor[:, None] * points.sums + bias[:, None])
  with np.errstate(divide="ignore"):
    edges = right / sums
  edges = np.where(edges > 0, edges, np.inf)
  order = np.argsort(edges, 1)
  edges = np.take_along_axis(edges, order, 1)
  change = np.where(right > 0, -weight, weight)
  wrong = weight[right > 0].sum() + np.cumsum(change[order], 1)
  # Intervals between edges: how wide, as a ratio, and the best and widest.
  ends = np.minimum(np.roll(edges, -1, 1), 2 * edges)
  ends[:, -1] = 2 * edges[:, -1]
  width = np.ones_like(edges)
  np.divide(ends, edges, out=width, where=np.isfinite(edges))
  wrong[width < 1 + 2.0**-22] = np.inf  # holds no float32
  width[wrong > wrong.min() + 1e-9] = 0.0
  row, column = np.unravel_index(np.argmax(width), width.shape)
  middle = edges[row, column] * np.sqrt(width[row, column])
  return row, np.float32(middle)
