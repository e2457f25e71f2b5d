"""What layers cost at their candidate bit-widths: integers [L, B].

Integers, because budgets are then met exactly: bits, BOPs, nanoseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from dr_jax.allocate.problem import integer

if TYPE_CHECKING:
  from numpy.typing import ArrayLike

_INT64 = 2**63


def stored_bits(parameters: Sequence[int], bits: Sequence[int]) -> np.ndarray:
  """Returns the bits that each layer's weights take: parameters x bits.

  Args:
    parameters: L weights per layer.
    bits: B candidate bit-widths.

  Returns:
    int64 [L, B]. A budget of bytes is 8 times as many bits.

  Raises:
    ValueError: for anything but positive integers.

  >>> stored_bits([10, 30], (8, 4)).tolist()
  [[80, 40], [240, 120]]
  """
  counts, widths = _positive("parameters", parameters), _positive("bits", bits)
  return _table([[count * b for b in widths] for count in counts])


def bops(
  macs: Sequence[int],
  bits: Sequence[int],
  activation_bits: Sequence[int] | None = None,
) -> np.ndarray:
  """Returns the bit operations of each layer: MACs x w_bits x a_bits.

  Args:
    macs: L multiply-accumulates of one example.
    bits: B candidate bit-widths of the weights.
    activation_bits: B bit-widths of the input that go with them; the same
      where None.

  Returns:
    int64 [L, B].

  Raises:
    ValueError: for anything but positive integers, or other lengths.

  References:
    arXiv 2011.10680, eq. 13.

  >>> bops([100], (8, 4)).tolist(), bops([100], (8, 4), (8, 8)).tolist()
  ([[6400, 1600]], [[6400, 3200]])
  """
  counts, widths = _positive("macs", macs), _positive("bits", bits)
  inputs = widths
  if activation_bits is not None:
    inputs = _positive("activation_bits", activation_bits)
  if len(inputs) != len(widths):
    raise ValueError(
      f"activation_bits must be one for each of {tuple(widths)}, got "
      f"{tuple(inputs)}"
    )
  pairs = list(zip(widths, inputs, strict=True))
  return _table([[count * w * a for w, a in pairs] for count in counts])


def mean_bits(layers: int, bits: Sequence[int]) -> np.ndarray:
  """Returns the bits themselves, whose sum is L times the mean bit-width.

  Args:
    layers: L.
    bits: B candidate bit-widths.

  Returns:
    int64 [L, B]. `mean_bits_budget` turns a mean into a budget of the sum.

  >>> mean_bits(3, (8, 4)).tolist()
  [[8, 4], [8, 4], [8, 4]]
  """
  widths = _positive("bits", bits)
  (count,) = _positive("layers", [layers])
  return _table([widths] * count)


def mean_bits_budget(mean: float, layers: int) -> int:
  """Returns the largest sum of bits with at most this mean: floor(mean L).

  A mean is read as it is printed: 3.3 times 10 layers is 33, although the
  float 3.3 is less than that.

  Args:
    mean: bit-width, averaged over layers.
    layers: L, their number.

  Raises:
    ValueError: unless the mean is positive and finite.

  >>> mean_bits_budget(3.3, 10)
  33
  """
  (count,) = _positive("layers", [layers])
  if not (math.isfinite(mean) and mean > 0):
    raise ValueError(f"mean must be > 0 and finite, got {mean!r}")
  return math.floor(Fraction(str(mean)) * count)


def latency(
  table: Mapping[str, Mapping[int, float]],
  layers: Sequence[str],
  bits: Sequence[int],
) -> np.ndarray:
  """Returns measured times in nanoseconds.

  Args:
    table: {layer: {bits: seconds}}; more than is asked for is ignored.
    layers: L names, in the order of the result.
    bits: B candidate bit-widths.

  Returns:
    int64 [L, B], rounded to the nearest nanosecond.

  Raises:
    ValueError: for a missing entry, or one that is negative or not finite.

  >>> table = {"conv1": {8: 2e-6, 4: 1.5e-6}}
  >>> latency(table, ["conv1"], (8, 4)).tolist()
  [[2000, 1500]]
  """
  widths = _positive("bits", bits)
  rows = []
  for layer in layers:
    if layer not in table:
      raise ValueError(
        f"table must have all layers of {list(layers)}, but lacks {layer!r}"
      )
    row = []
    for b in widths:
      if b not in table[layer]:
        raise ValueError(
          f"table[{layer!r}] must have all bits of {widths}, but lacks {b}"
        )
      seconds = float(table[layer][b])
      if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(
          f"table[{layer!r}][{b}] must be seconds >= 0, got {seconds}"
        )
      row.append(round(Fraction(seconds) * 10**9))
    rows.append(row)
  return _table(rows)


def between(cost: ArrayLike, fraction: float) -> int:
  """Returns a budget between the cheapest and the most expensive allocation.

    low + fraction (high - low), rounded down

  Args:
    cost: integers [L, B]; low and high are the sums of every layer's smallest
      and largest entries.
    fraction: 0..1.

  Raises:
    ValueError: for other fractions.

  References:
    arXiv 2011.10680, section 3.4 and appendix.

  >>> between([[80, 40], [240, 120]], 0.25)
  200
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f"fraction must be in 0..1, got {fraction!r}")
  entries = np.asarray(cost).astype(object)
  low, high = int(entries.min(1).sum()), int(entries.max(1).sum())
  return low + math.floor(Fraction(str(fraction)) * (high - low))


def _positive(field: str, values: Sequence[int]) -> list[int]:
  if not len(values):
    raise ValueError(f"{field} must not be empty")
  return [integer(field, value, at_least=1) for value in values]


def _table(rows: Sequence[Sequence[int]]) -> np.ndarray:
  largest = max((entry for row in rows for entry in row), default=0)
  if largest >= _INT64:
    raise ValueError(f"cost must be < 2^63, got {largest}")
  return np.array(rows, np.int64)
