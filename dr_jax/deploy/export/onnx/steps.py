"""The steps that networks are lowered to, each in one normal form.

Affine    y = gain * x + offset, per channel (the last axis)
Clip      y = min(max(x, low), high)
Quantize  codes = clip(round(gain * x + offset), low, high)
Weight    weight = scale * codes
Contract  y = gain * (codes * weight codes) + offset, a convolution or product
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from dr_jax.deploy.export.graph import Node, Value


class Affine(NamedTuple):
  """y = gain * x + offset; float64, scalars or [channels]."""

  x: Value
  output: Value
  gain: np.ndarray
  offset: np.ndarray


class Clip(NamedTuple):
  """y = min(max(x, low), high); a bound that is infinite is none."""

  x: Value
  output: Value
  low: float
  high: float


class Quantize(NamedTuple):
  """codes = clip(round_half_even(gain * x + offset), low, high).

  Attributes:
    x: float.
    output: the codes times `scale`, as traced.
    layer: name of the layer whose input this is.
    low, high: smallest and largest code.
    scale: what one code stands for.
  """

  x: Value
  output: Value
  layer: str
  gain: np.ndarray
  offset: np.ndarray
  low: int
  high: int
  scale: float


class Weight(NamedTuple):
  """The stored weight of a layer: codes times `scale` [] or [c_out]."""

  output: Value
  layer: str
  codes: np.ndarray
  scale: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Contract:
  """Integer convolution or product, in units of gain, plus offset.

  Attributes:
    quantize, weight: its operands.
    node: the primitive and its parameters.
    output: float, or the output of `requantize`.
    gain, offset: float64 [c_out].
    requantize: the only reader of the result, where it is computed with it.
  """

  quantize: Quantize
  weight: Weight
  node: Node
  output: Value
  gain: np.ndarray
  offset: np.ndarray
  requantize: Quantize | None = None


Step = Node | Affine | Clip | Quantize | Weight | Contract
