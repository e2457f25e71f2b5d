"""ONNX nodes for convolutions and products of codes.

product   DequantizeLinear, MatMul: integers in ONNX Runtime, float output
fused     DequantizeLinear, Conv, QuantizeLinear: integers, 8-bit output
float     DequantizeLinear, Conv: grouped convolutions with float output
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dr_jax.deploy.export.graph import Node, Value
from dr_jax.deploy.export.onnx import primitives, weights
from dr_jax.deploy.export.onnx.builder import MICROSOFT
from dr_jax.deploy.export.onnx.requantize import (
  Requantization,
  requantization,
)
from dr_jax.deploy.export.onnx.steps import Contract, Weight
from dr_jax.deploy.export.onnx.windows import windows

if TYPE_CHECKING:
  from dr_jax.deploy.export.onnx.emit import Emitter


def emit(emitter: Emitter, step: Contract) -> None:
  """Emits a contraction, and the quantizer that is computed with it."""
  codes = emitter.codes(step.quantize)
  order, pivot = None, 0
  if step.node.operation == "dot_general":
    name = _product(emitter, step, emitter.tensor(codes))
  else:
    order = tuple(step.node.params["dimension_numbers"].out_spec)
    found = _requantization(emitter, step)
    if found is not None:
      name, pivot = _fused(emitter, step, codes, found), found.pivot
      emitter.exact[step.weight.layer] = found.exact
    elif step.node.params["feature_group_count"] > 1:
      name = _grouped(emitter, step, codes)
      name = emitter.offset(name, step, order)
    else:
      name, order = _windowed(emitter, step, codes), None
  if step.requantize is None:
    emitter.put(step.output, name, order)
  else:
    emitter.put_quantized(step.requantize, name, 1.0, order, pivot)


def emit_packed(emitter: Emitter, node: Node, weight: Weight) -> None:
  """Emits a product of floats with packed codes."""
  builder = emitter.builder
  c_in, c_out = weight.codes.shape
  packed, bits = weights.blocks(weight.codes)
  scale = np.broadcast_to(weight.scale, (c_out,)).astype(np.float32)
  scale = np.repeat(scale[:, None], packed.shape[1], axis=1)
  name = builder.add(
    "MatMulNBits",
    emitter.tensor(node.inputs[0]),
    builder.constant(packed, f"{weight.layer}/weight_codes"),
    builder.constant(scale, f"{weight.layer}/weight_scale"),
    domain=MICROSOFT,
    name=weight.layer,
    K=c_in,
    N=c_out,
    bits=bits,
    block_size=weights.BLOCK,
    accuracy_level=1,  # float32
  )
  emitter.put(node.output, name)


def _windowed(emitter: Emitter, step: Contract, codes: Value) -> str:
  """A convolution as a product of its windows."""
  builder = emitter.builder
  _, *size, _ = codes.shape
  found = windows(tuple(size), step.weight.codes.shape, step.node.params)
  name = emitter.tensor(codes)
  if np.any(found.padding):
    low, high = zip(*found.padding, strict=True)
    pads = builder.constant(np.array([0, *low, 0, 0, *high, 0]))
    zero = emitter.zero_point(step.quantize)
    name = builder.add("Pad", name, pads, zero)
  if found.index is not None:
    name = _reshaped(builder, name, found.places)
    name = builder.add("Gather", name, builder.constant(found.index), axis=1)
    name = _reshaped(builder, name, found.rows)
  name = _product(emitter, step, name, found.fold)
  if found.fold > 1:
    name = _reshaped(builder, name, step.node.output.shape[1:])
  return name


def _reshaped(builder, name, shape):
  """All axes but the batch reshaped."""
  return builder.add("Reshape", name, builder.constant(np.array([0, *shape])))


def _product(emitter: Emitter, step: Contract, rows: str, fold: int = 1) -> str:
  """gain * (rows * codes) + offset."""
  builder, layer = emitter.builder, step.weight.layer
  codes = weights.flat(
    builder,
    emitter.source(builder, step.weight),
    step.weight.codes.shape,
    fold,
  )
  scale = np.tile(step.gain / step.quantize.scale, fold)
  scale = builder.constant(np.float32(scale), f"{layer}/weight_scale")
  offset = np.tile(step.offset, fold).astype(np.float32)
  if emitter.microsoft and np.any(offset):
    return builder.add(
      "MatMulIntegerToFloat",
      rows,
      codes,
      builder.constant(np.float32(step.quantize.scale), "scale"),
      scale,
      emitter.zero_point(step.quantize),
      builder.constant(np.zeros(offset.shape, np.int8)),
      builder.constant(offset),
      domain=MICROSOFT,
      name=layer,
    )
  name = builder.add(
    "MatMul",
    emitter.dequantized(rows, step.quantize, step.quantize.scale),
    builder.add("DequantizeLinear", codes, scale, axis=1),
    name=layer,
  )
  if np.any(offset):
    name = builder.add("Add", name, builder.constant(offset))
  return name


def _grouped(emitter: Emitter, step: Contract, codes: Value) -> str:
  """A convolution with float output."""
  kernel = emitter.source(emitter.builder, step.weight)
  scale = step.quantize.scale
  return _convolution(emitter, step, codes, scale, kernel, step.gain / scale)


def _fused(emitter, step, codes, found):
  """Conv as ONNX Runtime fuses it with QuantizeLinear; its unit is one code."""
  builder, layer = emitter.builder, step.weight.layer
  kernel = emitter.source(builder, step.weight)
  kernel = weights.multiplied(builder, kernel, found.factor)
  bias = builder.add(
    "DequantizeLinear",
    builder.constant(found.bias, f"{layer}/bias"),
    builder.constant(found.multiplier, f"{layer}/weight_scale"),
    axis=0,
  )
  return _convolution(emitter, step, codes, 1.0, kernel, found.multiplier, bias)


def _convolution(emitter, step, codes, scale, kernel, weight_scale, *bias):
  """DequantizeLinear and Conv, of codes with a scale."""
  builder, layer, params = emitter.builder, step.weight.layer, step.node.params
  dims = params["dimension_numbers"]
  x = emitter.tensor(codes, dims.lhs_spec)
  weight_scale = np.float32(weight_scale)
  return builder.add(
    "Conv",
    emitter.dequantized(x, step.quantize, scale),
    builder.add(
      "DequantizeLinear",
      weights.ordered(builder, kernel, dims.rhs_spec),
      builder.constant(weight_scale, f"{layer}/weight_scale"),
      axis=0,
    ),
    *bias,
    name=layer,
    **primitives.convolution_attributes(params, step.weight.codes.shape[:-2]),
  )


def _requantization(emitter: Emitter, step: Contract) -> Requantization | None:
  """How a convolution gives the codes of its reader, if one is to give any."""
  if step.requantize is None:
    return None
  x, y, codes = step.quantize, step.requantize, step.weight.codes
  ends = np.multiply.outer([x.low, x.high], codes.astype(np.int64))
  axes = tuple(range(codes.ndim - 1))
  sums = np.stack([ends.min(0).sum(axes), ends.max(0).sum(axes)])
  largest = weights.largest_factor(codes, x.high + emitter.zero(x))
  return requantization(step.gain, step.offset, (y.low, y.high), sums, largest)
