"""ONNX nodes for the steps of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dr_jax.deploy.export.graph import Layer, Operand, Value, trace_function
from dr_jax.deploy.export.onnx import contractions, primitives
from dr_jax.deploy.export.onnx.builder import Builder
from dr_jax.deploy.export.onnx.forms import is_supported
from dr_jax.deploy.export.onnx.steps import (
  Affine,
  Clip,
  Contract,
  Quantize,
  Step,
  Weight,
)
from dr_jax.deploy.export.onnx.weights import Source

Order = tuple[int, ...]

# Elements of a run at which broadcasting costs nothing.
_LONG_RUN = 128


class Emitter:
  """Emits steps; knows under which names values exist, in which axis orders.

  JAX has channels last, ONNX convolutions have them first. A value is kept in
  the order in which it was computed, and transposed where it is read in
  another one.

  Attributes:
    builder: takes the nodes.
    source: where weight codes come from.
    microsoft: whether to use operators that only ONNX Runtime has.
    packs_products: whether products of floats with a weight read packed codes.
    exact: {layer: bool [c_out]} of convolutions that give codes directly,
      whether these are exact; see `Requantization`.
  """

  def __init__(self, builder: Builder, source: Source, *, microsoft: bool):
    self.builder, self.source, self.microsoft = builder, source, microsoft
    self.packs_products = False
    self.exact: dict[str, np.ndarray] = {}
    self._names: dict[int, dict[Order, str]] = {}
    self._codes: dict[int, tuple[Quantize, Value]] = {}
    self._weights: dict[int, Weight] = {}

  def emit(self, step: Step) -> None:
    """Emits one step; all that it reads was emitted before."""
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
        contractions.emit(self, step)
      case _:
        self._primitive(step)

  def _primitive(self, node):
    is_product = node.operation == "dot_general" and is_supported(node)
    weight = self._weights.get(id(node.inputs[-1])) if is_product else None
    if weight is not None and self.packs_products:
      contractions.emit_packed(self, node, weight)
    else:
      primitives.emit(self, node)

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
    order = tuple(order or range(len(value.shape)))
    self._materialize(value)
    names = self._names[id(value)]
    if order not in names:
      have, name = next(iter(names.items()))
      perm = [have.index(axis) for axis in order]
      names[order] = self.builder.add("Transpose", name, perm=perm)
    return names[order]

  def codes(self, step: Quantize) -> Value:
    """The uint8 codes that a quantizer made; see `put_quantized`."""
    return self._codes[id(step.output)][1]

  def put_quantized(
    self,
    step: Quantize,
    name: str,
    scale: float,
    order: Order | None,
    pivot: int = 0,
  ) -> None:
    """Quantizes a float tensor, x of a step, with codes of this scale.

    Codes are uint8; those of a signed quantizer have zero point 128. The tensor
    is zero at the code `pivot`.
    """
    zero = self.zero(step)
    name = self.builder.add(
      "QuantizeLinear",
      name,
      self.builder.constant(np.float32(scale), "scale"),
      self.builder.constant(np.uint8(zero + pivot), "zero"),
      name=f"{step.layer}/input_codes",
    )
    low, high = step.low + zero, step.high + zero
    if (low, high) != (0, 255):
      ends = [self.builder.constant(np.uint8(end)) for end in (low, high)]
      name = self.builder.add("Clip", name, *ends)
    codes = Value(step.output.shape, np.dtype(np.uint8))
    self._codes[id(step.output)] = step, codes
    self.put(codes, name, order)

  def dequantized(self, name: str, step: Quantize, scale: float) -> str:
    """Codes of a quantizer, times a scale, as floats."""
    factor = self.builder.constant(np.float32(scale), "scale")
    zero = self.zero_point(step)
    return self.builder.add("DequantizeLinear", name, factor, zero)

  def offset(self, name: str, step: Any, order: Order) -> str:
    """A tensor with its axes in an order, plus the offset of a step."""
    if not np.any(step.offset):
      return name
    offset = _broadcastable(step.offset, step.output.shape, order)
    return self.builder.add("Add", name, self.builder.constant(offset))

  def zero(self, step: Quantize) -> int:
    """The uint8 code that stands for zero."""
    return 128 if step.low < 0 else 0

  def zero_point(self, step: Quantize) -> str:
    """The name of the code that stands for zero."""
    return self.builder.constant(np.uint8(self.zero(step)), "zero")

  def _materialize(self, value):
    """Computes the floats that codes stand for, where something reads them.

    By Cast and Mul: behind DequantizeLinear, ONNX Runtime takes a layer of
    float weights for one to be quantized, and rounds them to 8 bits.
    """
    if id(value) in self._names:
      return
    if id(value) in self._weights:
      self.put(value, self._weight(self._weights[id(value)]))
      return
    step, codes = self._codes[id(value)]
    order = self.order(codes)
    name = self.builder.cast(self.tensor(codes, order), np.float32)
    if step.low < 0:
      zero = self.builder.constant(np.float32(128))
      name = self.builder.add("Sub", name, zero)
    scale = self.builder.constant(np.float32(step.scale), "scale")
    self.put(value, self.builder.add("Mul", name, scale), order)

  def _weight(self, step):
    """A float weight, as it is decoded."""
    codes = self.builder.cast(self.source(self.builder, step), np.float32)
    scale = np.float32(step.scale)
    scale = self.builder.constant(scale, f"{step.layer}/weight_scale")
    return self.builder.add("Mul", codes, scale)

  def _affine(self, step):
    order = self.order(step.x)
    self.put(step.output, self._scaled(step, order), order)

  def _scaled(self, step, order):
    """gain * x + offset, with axes in an order."""
    name = self.tensor(step.x, order)
    if np.any(step.gain != 1):
      gain = _broadcastable(step.gain, step.output.shape, order)
      name = self.builder.add("Mul", name, self.builder.constant(gain))
    return self.offset(name, step, order)

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
    if np.ndim(step.gain) or np.any(step.offset):
      name, scale = self._scaled(step, order), 1.0
    else:
      name, scale = self.tensor(step.x, order), float(1 / step.gain)
    self.put_quantized(step, name, scale, order)


def derived(layers: Mapping[str, Layer]) -> Source:
  """Codes of one bit-width from what layers store for all of them.

  What derives them in JAX is traced, and its operations become nodes.

  Args:
    layers: at the bit-width.
  """

  def source(builder, weight):
    layer = layers[weight.layer]
    quantizer: Any = layer.weight
    keys = sorted(layer.encoded)
    graph = trace_function(
      lambda *arrays: (
        (
          quantizer.integers(dict(zip(keys, arrays, strict=True)), layer.index)
        ).codes
      ),
      [layer.encoded[key] for key in keys],
    )
    emitter = Emitter(builder, source, microsoft=False)
    used = {id(x) for node in graph.nodes for x in node.inputs}
    for x, key in zip(graph.inputs, keys, strict=True):
      if id(x) in used:
        array = np.asarray(layer.encoded[key])
        emitter.put(x, builder.constant(array, f"{weight.layer}/{key}"))
    for node in graph.nodes:
      emitter.emit(node)
    codes = emitter.tensor(graph.outputs[0])
    narrow = graph.outputs[0].dtype == weight.codes.dtype
    return codes if narrow else builder.cast(codes, weight.codes.dtype)

  return source


def _broadcastable(c, shape, order):
  """A constant per channel, in float32, for values of this shape in an order.

  ONNX Runtime broadcasts in runs of the last axis: where that are few channels,
  the constant is repeated along the axis before.
  """
  c = np.asarray(c, np.float32)
  after = len(order) - 1 - order.index(len(order) - 1)
  if not c.ndim or after:
    return c.reshape(c.shape + (1,) * after * c.ndim)
  if len(shape) < 3 or len(c) >= _LONG_RUN or not isinstance(shape[-2], int):
    return c
  return np.tile(c, (shape[-2], 1))
