"""ONNX nodes for the steps of a network."""

from __future__ import annotations

import math

import numpy as np

from dr_jax.deploy.graph import Operand, Value
from dr_jax.deploy.onnx import primitives
from dr_jax.deploy.onnx.builder import Builder
from dr_jax.deploy.onnx.lower import (
  Affine,
  Clip,
  Contract,
  Quantize,
  Step,
  Weight,
)

Order = tuple[int, ...]

# Bias codes, and what they are added to, stay far inside of int32.
_LARGEST_BIAS = 2**30


class Emitter:
  """Emits steps; knows under which names values exist, in which axis orders.

  JAX has channels last, ONNX convolutions have them first. A value is kept in
  the order in which it was computed, and transposed where it is read in
  another one.
  """

  def __init__(self, builder: Builder):
    self.builder = builder
    self._names: dict[int, dict[Order, str]] = {}
    self._codes: dict[int, tuple[Quantize, Value]] = {}
    self._weights: dict[int, Weight] = {}

  def emit(self, step: Step) -> None:
    match step:
      case Affine():
        self._affine(step)
      case Clip():
        self._clip(step)
      case Quantize():
        self._quantize(step)
      case Weight():
        self._weights[id(step.output)] = step
      case Contract():
        self._contract(step)
      case _:
        primitives.emit(self, step)

  def put(self, value: Value, name: str, order: Order | None = None) -> None:
    """Says that a tensor holds a value with its axes in an order."""
    order = order or tuple(range(len(value.shape)))
    self._names.setdefault(id(value), {})[order] = name

  def order(self, value: Value) -> Order:
    """The order that a value exists in."""
    self._materialize(value)
    return next(iter(self._names[id(value)]))

  def tensor(self, value: Operand, order: Order | None = None) -> str:
    """The name of a value with its axes in an order, JAX's by default."""
    if isinstance(value, np.ndarray):
      if order is not None and value.ndim == len(order):
        value = value.transpose(order)
      return self.builder.constant(value)
    order = order or tuple(range(len(value.shape)))
    self._materialize(value)
    names = self._names[id(value)]
    if order not in names:
      have, name = next(iter(names.items()))
      perm = [have.index(axis) for axis in order]
      names[order] = self.builder.add("Transpose", name, perm=perm)
    return names[order]

  def _materialize(self, value):
    """Computes the float value of codes where something reads it."""
    if id(value) in self._names:
      return
    if id(value) in self._weights:
      self.put(value, self._weight(self._weights[id(value)]))
      return
    step, codes = self._codes[id(value)]
    order = self.order(codes)
    name = self._dequantized(self.tensor(codes, order), step)
    self.put(value, name, order)

  def _weight(self, step):
    """The float weight, where something else than a contraction reads it."""
    scale = np.float32(step.scale)
    return self.builder.add(
      "DequantizeLinear",
      self.builder.constant(step.codes, f"{step.layer}/weight_codes"),
      self.builder.constant(scale, f"{step.layer}/weight_scale"),
      **({"axis": step.codes.ndim - 1} if scale.ndim else {}),
    )

  def _dequantized(self, name, step):
    return self.builder.add(
      "DequantizeLinear",
      name,
      self.builder.constant(np.float32(step.scale), "scale"),
      self._zero_point(step),
    )

  def _zero_point(self, step):
    return self.builder.constant(np.uint8(128 if step.low < 0 else 0), "zero")

  def _affine(self, step):
    order = self.order(step.x)
    name = self.scaled(
      self.tensor(step.x, order), step.gain, step.offset, order
    )
    self.put(step.output, name, order)

  def scaled(self, name, gain, offset, order):
    """gain * x + offset per channel, which is the last axis in JAX's order."""
    channels = order.index(len(order) - 1)
    for operation, c, neutral in (("Mul", gain, 1), ("Add", offset, 0)):
      if not np.all(c == neutral):
        c = np.asarray(c, np.float32)
        if c.ndim:
          c = c.reshape([-1] + [1] * (len(order) - 1 - channels))
        name = self.builder.add(operation, name, self.builder.constant(c))
    return name

  def _clip(self, step):
    order = self.order(step.x)
    name = self.tensor(step.x, order)
    if (step.low, step.high) == (0, np.inf):
      name = self.builder.add("Relu", name)
    else:
      ends = [
        self.builder.constant(np.float32(end)) if np.isfinite(end) else ""
        for end in (step.low, step.high)
      ]
      name = self.builder.add("Clip", name, *ends)
    self.put(step.output, name, order)

  def _quantize(self, step):
    order = self.order(step.x)
    name, gain = self.tensor(step.x, order), step.gain
    if np.ndim(gain) or np.any(step.offset):
      name = self.scaled(name, gain, step.offset, order)
      gain = np.float64(1)
    self._put_codes(step, self.quantized(name, step, 1 / gain), order)

  def quantized(self, name: str, step: Quantize, scale: float) -> str:
    """uint8 codes of a float tensor; signed ones have zero point 128."""
    name = self.builder.add(
      "QuantizeLinear",
      name,
      self.builder.constant(np.float32(scale), "scale"),
      self._zero_point(step),
      name=f"{step.layer}/input_codes",
    )
    zero = 128 if step.low < 0 else 0
    low, high = step.low + zero, step.high + zero
    if (low, high) == (0, 255):
      return name
    ends = [self.builder.constant(np.uint8(end)) for end in (low, high)]
    return self.builder.add("Clip", name, *ends)

  def _put_codes(self, step, name, order):
    codes = Value(step.output.shape, np.dtype(np.uint8))
    self._codes[id(step.output)] = step, codes
    self.put(codes, name, order)

  def _contract(self, step):
    _, codes = self._codes[id(step.quantize.output)]
    if step.node.operation == "dot_general":
      rows = self.tensor(codes)
    else:
      params = step.node.params
      if step.requantize is not None and self._fused(step, codes):
        return
      if params["feature_group_count"] > 1:
        self._convolved(step, codes)
        return
      rows = self._patches(step, codes)
    name = self._product(step, rows)
    self._finish(step, name)

  def _finish(self, step, name):
    if step.requantize is None:
      self.put(step.output, name)
    else:
      name = self.quantized(name, step.requantize, 1.0)
      self._put_codes(step.requantize, name, None)

  def _product(self, step, rows):
    layer = step.weight.layer
    codes = step.weight.codes
    codes = codes.reshape(-1, codes.shape[-1])
    weight = self.builder.add(
      "DequantizeLinear",
      self.builder.constant(codes, f"{layer}/weight_codes"),
      self.builder.constant(
        np.float32(step.gain / step.quantize.scale), f"{layer}/weight_scale"
      ),
      axis=1,
    )
    name = self.builder.add(
      "MatMul",
      self._dequantized(rows, step.quantize),
      weight,
      name=layer,
    )
    rank = len(step.node.output.shape)
    return self.scaled(name, np.ones(()), step.offset, tuple(range(rank)))

  def _patches(self, step, codes):
    """The windows of a convolution as rows, by one Gather."""
    params, kernel = step.node.params, step.weight.codes.shape
    windows = kernel[:-2]
    plain = set(windows) == set(params["window_strides"]) == {1}
    name = self.tensor(codes)
    if plain and not np.any(params["padding"]):
      return name
    _, *size, channels = codes.shape
    places = math.prod(size)
    shape = self.builder.constant(np.array([0, places, channels]))
    name = self.builder.add("Reshape", name, shape)
    index = _window_positions(size, windows, params)
    if np.any(index == places):
      pads = self.builder.constant(np.array([0, 0, 0, 0, 1, 0]))
      zero = self._zero_point(step.quantize)
      name = self.builder.add("Pad", name, pads, zero)
    index = self.builder.constant(index.reshape(-1).astype(np.int32))
    name = self.builder.add("Gather", name, index, axis=1)
    _, *after, _ = step.node.output.shape
    width = math.prod(kernel[:-1])
    shape = self.builder.constant(np.array([0, *after, width]))
    return self.builder.add("Reshape", name, shape)

  def _convolution(self, step, codes, gain, weight_codes, bias):
    """DequantizeLinear, Conv: in float, or fused with what follows."""
    layer = step.weight.layer
    params = step.node.params
    dims = params["dimension_numbers"]
    x = self._dequantized(self.tensor(codes, dims.lhs_spec), step.quantize)
    weight = self.builder.add(
      "DequantizeLinear",
      self.builder.constant(
        weight_codes.transpose(dims.rhs_spec), f"{layer}/weight_codes"
      ),
      self.builder.constant(
        np.float32(gain / step.quantize.scale), f"{layer}/weight_scale"
      ),
      axis=0,
    )
    return self.builder.add(
      "Conv",
      x,
      weight,
      bias,
      name=layer,
      **primitives.convolution_attributes(params, weight_codes.shape[:-2]),
    )

  def _convolved(self, step, codes):
    order = step.node.params["dimension_numbers"].out_spec
    bias = self.builder.constant(np.float32(step.offset))
    name = self._convolution(step, codes, step.gain, step.weight.codes, bias)
    if step.requantize is None:
      self.put(step.output, name, order)
    else:
      name = self.quantized(name, step.requantize, 1.0)
      self._put_codes(step.requantize, name, order)

  def _fused(self, step, codes):
    """Conv between DequantizeLinear and QuantizeLinear; False if it has none.

    Bias codes are in units of one code product, gain: codes of less than 8 bits
    are shifted up first, which makes that unit finer.
    """
    layer = step.weight.layer
    shift = _free_bits(step.weight.codes)
    gain = step.gain / 2**shift
    with np.errstate(all="ignore"):
      bias = np.round(step.offset / gain)
    if not np.all(np.abs(bias) < _LARGEST_BIAS):
      return False
    name = self._convolution(
      step,
      codes,
      gain,
      step.weight.codes << shift,
      self.builder.add(
        "DequantizeLinear",
        self.builder.constant(bias.astype(np.int32), f"{layer}/bias"),
        self.builder.constant(np.float32(gain), f"{layer}/bias_scale"),
        axis=0,
      ),
    )
    order = step.node.params["dimension_numbers"].out_spec
    name = self.quantized(name, step.requantize, 1.0)
    self._put_codes(step.requantize, name, order)
    return True


def _free_bits(codes: np.ndarray) -> int:
  """How far int8 codes can be shifted left."""
  shift = 0
  while (
    -128 <= int(codes.min()) << shift + 1
    and (int(codes.max()) << shift + 1) <= 127
    and shift < 7
  ):
    shift += 1
  return shift


def _window_positions(size, windows, params) -> np.ndarray:
  """Position of every tap of every window in a flat image [places, taps].

  Positions in the padding are the number of places.
  """
  taps = []
  for n, k, stride, dilation, (low, high) in zip(
    size,
    windows,
    params["window_strides"],
    params["rhs_dilation"],
    params["padding"],
    strict=True,
  ):
    count = (n + low + high - (k - 1) * dilation - 1) // stride + 1
    start = np.arange(count)[:, None] * stride - low
    taps.append(start + np.arange(k)[None] * dilation)
  dims = len(size)
  flat, inside = 0, True
  for axis, (positions, n) in enumerate(zip(taps, size, strict=True)):
    shape = [1] * (2 * dims)
    shape[axis], shape[dims + axis] = positions.shape
    grid = positions.reshape(shape)
    flat = flat * n + grid
    inside = inside & (grid >= 0) & (grid < n)
  return np.where(inside, flat, math.prod(size))
