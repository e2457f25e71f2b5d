"""ONNX nodes for the primitives of JAX that networks consist of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dr_jax.deploy.export.graph import GraphError, Node, Value

# Elementwise, by name: of one operand, or of several that broadcast.
_ELEMENTWISE = {
  "abs": "Abs",
  "add": "Add",
  "and": "BitwiseAnd",
  "ceil": "Ceil",
  "copy": "Identity",
  "cos": "Cos",
  "cosh": "Cosh",
  "div": "Div",
  "erf": "Erf",
  "exp": "Exp",
  "floor": "Floor",
  "log": "Log",
  "logistic": "Sigmoid",
  "max": "Max",
  "min": "Min",
  "mul": "Mul",
  "neg": "Neg",
  "pow": "Pow",
  "sign": "Sign",
  "sin": "Sin",
  "sqrt": "Sqrt",
  "stop_gradient": "Identity",
  "sub": "Sub",
  "tanh": "Tanh",
  "eq": "Equal",
  "ge": "GreaterOrEqual",
  "gt": "Greater",
  "le": "LessOrEqual",
  "lt": "Less",
}
_REDUCTIONS = {
  "reduce_max": "ReduceMax",
  "reduce_min": "ReduceMin",
  "reduce_prod": "ReduceProd",
  "reduce_sum": "ReduceSum",
}


def emit(emitter: Any, node: Node) -> None:
  """Emits a primitive; GraphError names one that has no counterpart."""
  name = node.operation
  if name in _ELEMENTWISE:
    _elementwise(emitter, node, _ELEMENTWISE[name])
  elif name in _REDUCTIONS:
    _reduction(emitter, node, _REDUCTIONS[name])
  elif name in _OTHERS:
    _OTHERS[name](emitter, node)
  else:
    raise GraphError(f"primitive {name} has no counterpart in ONNX here")


def convolution_attributes(
  params: dict[str, Any], windows: tuple[int, ...]
) -> dict[str, Any]:
  """Attributes of an ONNX Conv."""
  low, high = zip(*params["padding"], strict=True)
  return {
    "kernel_shape": list(windows),
    "strides": list(params["window_strides"]),
    "dilations": list(params["rhs_dilation"]),
    "pads": [*low, *high],
    "group": params["feature_group_count"],
  }


def _elementwise(emitter, node, operation):
  values = [x for x in node.inputs if isinstance(x, Value)]
  rank = len(node.output.shape)
  order = tuple(range(rank))
  orders = {emitter.order(x) for x in values if len(x.shape) == rank}
  if len(orders) == 1:
    (order,) = orders
  names = [emitter.tensor(x, order) for x in node.inputs]
  emitter.put(node.output, emitter.builder.add(operation, *names), order)


def _reduction(emitter, node, operation):
  axes = emitter.builder.constant(np.array(node.params["axes"], np.int64))
  name = emitter.tensor(node.inputs[0])
  name = emitter.builder.add(operation, name, axes, keepdims=0)
  emitter.put(node.output, name)


def _reshape(emitter, node):
  shape = [
    d if isinstance(d, int) else (0 if i == 0 and str(d) == "batch" else -1)
    for i, d in enumerate(node.output.shape)
  ]
  if shape.count(-1) > 1:
    raise GraphError(f"reshape to {node.output.shape} has two unknown sizes")
  name = emitter.builder.add(
    "Reshape",
    emitter.tensor(node.inputs[0]),
    emitter.builder.constant(np.array(shape, np.int64)),
  )
  emitter.put(node.output, name)


def _transpose(emitter, node):
  (x,) = node.inputs
  permutation = list(node.params["permutation"])
  name = emitter.builder.add("Transpose", emitter.tensor(x), perm=permutation)
  emitter.put(node.output, name)


def _convolution(emitter, node):
  x, kernel = node.inputs
  params = node.params
  dims = params["dimension_numbers"]
  if params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
    raise GraphError(
      "conv_general_dilated with lhs_dilation or batch groups has no "
      "counterpart in ONNX here"
    )
  name = emitter.builder.add(
    "Conv",
    emitter.tensor(x, dims.lhs_spec),
    emitter.tensor(kernel, dims.rhs_spec),
    **convolution_attributes(
      params, tuple(kernel.shape[d] for d in dims.rhs_spec[2:])
    ),
  )
  emitter.put(node.output, name, tuple(dims.out_spec))


def _max_pool(emitter, node):
  (x,) = node.inputs
  params = node.params
  order, spatial = _pool_order(node)
  low, high = zip(*(params["padding"][d] for d in spatial), strict=True)
  name = emitter.builder.add(
    "MaxPool",
    emitter.tensor(x, order),
    kernel_shape=[params["window_dimensions"][d] for d in spatial],
    strides=[params["window_strides"][d] for d in spatial],
    dilations=[params["window_dilation"][d] for d in spatial],
    pads=[*low, *high],
  )
  emitter.put(node.output, name, order)


def _pool_order(node):
  """Batch, channels, and the axes that are pooled."""
  params = node.params
  rank = len(node.output.shape)
  spatial = [d for d in range(1, rank) if params["window_dimensions"][d] > 1]
  if set(params["base_dilation"]) != {1} or len(spatial) != rank - 2:
    raise GraphError(f"{node.operation} must pool all axes but two")
  (channels,) = {*range(1, rank)} - {*spatial}
  return (0, channels, *spatial), spatial


def _product(emitter, node):
  x, y = node.inputs
  (left, right), (left_batch, right_batch) = node.params["dimension_numbers"]
  left_last = [*left] == [len(x.shape) - 1]
  right_first = [*right] == [len(right_batch)]
  batches = [*range(len(left_batch))]
  plain = [*left_batch] == [*right_batch] == batches
  matches = len(y.shape) - len(batches) == 2
  if not (left_last and right_first and plain and matches):
    raise GraphError("dot_general of these axes has no counterpart here")
  name = emitter.builder.add("MatMul", emitter.tensor(x), emitter.tensor(y))
  emitter.put(node.output, name)


def _cast(emitter, node):
  (x,) = node.inputs
  order = emitter.order(x)
  name = emitter.builder.cast(emitter.tensor(x, order), node.output.dtype)
  emitter.put(node.output, name, order)


def _round(emitter, node):
  if int(node.params["rounding_method"]) != 1:
    raise GraphError("round away from zero has no counterpart in ONNX here")
  _elementwise(emitter, node, "Round")


def _shift_right(emitter, node):
  """An arithmetic shift of integers below 2^24: Floor of an exact product."""
  x, shift = node.inputs
  if not isinstance(shift, np.ndarray):
    raise GraphError("shift_right_arithmetic by no constant")
  builder = emitter.builder
  wide = builder.cast(emitter.tensor(x), np.float32)
  factor = builder.constant(np.float32(2.0) ** -shift.astype(np.float32))
  name = builder.add("Floor", builder.add("Mul", wide, factor))
  emitter.put(node.output, builder.cast(name, node.output.dtype))


def _select(emitter, node):
  if len(node.inputs) != 3:
    raise GraphError("select_n of more than two has no counterpart here")
  condition, if_false, if_true = map(emitter.tensor, node.inputs)
  name = emitter.builder.add("Where", condition, if_true, if_false)
  emitter.put(node.output, name)


def _broadcast(emitter, node):
  """Reshape and Expand; a batch axis is one of x, or left to its readers."""
  x, shape = node.inputs[0], node.output.shape
  size = [1] * len(shape)
  for axis, d in zip(node.params["broadcast_dimensions"], x.shape, strict=True):
    size[axis] = d if isinstance(d, int) else -1
  if size.count(-1) > 1:
    raise GraphError(f"broadcast_in_dim to {shape} has two unknown sizes")
  builder = emitter.builder
  target = builder.constant(np.array(size, np.int64))
  name = builder.add("Reshape", emitter.tensor(x), target)
  # A size of 1 keeps the other's.
  target = [d if isinstance(d, int) else 1 for d in shape]
  if any(d > 1 and d != s for d, s in zip(target, size, strict=True)):
    name = builder.add("Expand", name, builder.constant(np.array(target)))
  emitter.put(node.output, name)


def _concatenate(emitter, node):
  names = map(emitter.tensor, node.inputs)
  axis = node.params["dimension"]
  emitter.put(node.output, emitter.builder.add("Concat", *names, axis=axis))


def _slice(emitter, node):
  (x,) = node.inputs
  params, builder = node.params, emitter.builder
  starts, limits = params["start_indices"], params["limit_indices"]
  if not all(isinstance(d, int) for d in (*starts, *limits[1:])):
    raise GraphError("slice of the batch has no counterpart in ONNX here")
  last = limits[0] if isinstance(limits[0], int) else np.iinfo(np.int64).max
  arrays = [
    starts,
    (last, *limits[1:]),
    range(len(x.shape)),
    params["strides"] or [1] * len(x.shape),
  ]
  constants = [builder.constant(np.array(a, np.int64)) for a in arrays]
  emitter.put(node.output, builder.add("Slice", emitter.tensor(x), *constants))


def _integer_pow(emitter, node):
  (x,) = node.inputs
  order = emitter.order(x)
  exponent = np.array(node.params["y"], x.dtype)
  names = emitter.tensor(x, order), emitter.builder.constant(exponent)
  emitter.put(node.output, emitter.builder.add("Pow", *names), order)


def _square(emitter, node):
  (x,) = node.inputs
  order = emitter.order(x)
  name = emitter.tensor(x, order)
  emitter.put(node.output, emitter.builder.add("Mul", name, name), order)


def _rsqrt(emitter, node):
  (x,) = node.inputs
  name = emitter.builder.add("Sqrt", emitter.tensor(x))
  emitter.put(node.output, emitter.builder.add("Reciprocal", name))


def _sum_pool(emitter, node):
  """AveragePool that counts padding, times the size of the window."""
  (x,) = node.inputs
  params = node.params
  order, spatial = _pool_order(node)
  low, high = zip(*(params["padding"][d] for d in spatial), strict=True)
  window = [params["window_dimensions"][d] for d in spatial]
  if set(params["window_dilation"]) != {1}:
    raise GraphError("reduce_window_sum with window_dilation")
  name = emitter.builder.add(
    "AveragePool",
    emitter.tensor(x, order),
    kernel_shape=window,
    strides=[params["window_strides"][d] for d in spatial],
    pads=[*low, *high],
    count_include_pad=1,
  )
  factor = emitter.builder.constant(np.float32(math.prod(window)))
  emitter.put(node.output, emitter.builder.add("Mul", name, factor), order)


_OTHERS: dict[str, Callable[[Any, Node], None]] = {
  "broadcast_in_dim": _broadcast,
  "concatenate": _concatenate,
  "conv_general_dilated": _convolution,
  "convert_element_type": _cast,
  "dot_general": _product,
  "expand_dims": _reshape,
  "integer_pow": _integer_pow,
  "reduce_window_max": _max_pool,
  "reduce_window_sum": _sum_pool,
  "reshape": _reshape,
  "round": _round,
  "rsqrt": _rsqrt,
  "select_n": _select,
  "shift_right_arithmetic": _shift_right,
  "slice": _slice,
  "square": _square,
  "squeeze": _reshape,
  "transpose": _transpose,
}
