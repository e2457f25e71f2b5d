"""What of a traced network has one of the forms of `steps`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.deploy.export.graph import (
  Layer,
  Node,
  Operand,
  Value,
  trace_function,
)
from dr_jax.deploy.export.onnx.steps import Affine, Clip


def as_affine(node: Node) -> Affine | None:
  """A node as gain and offset per channel, if it is one of float32."""
  if node.output.dtype != np.float32:
    return None
  if node.operation == "neg":
    return _affine(node, node.inputs[0], -1.0, 0.0)
  if node.operation not in ("add", "sub", "mul", "div"):
    return None
  x, c = node.inputs
  swapped = isinstance(x, np.ndarray)
  if swapped:
    x, c = c, x
  if not isinstance(x, Value) or not isinstance(c, np.ndarray):
    return None
  if x.shape != node.output.shape:
    return None
  c = per_channel(c, x)
  if c is None or (node.operation == "div" and (swapped or not np.all(c))):
    return None
  match node.operation:
    case "add":
      return _affine(node, x, 1.0, c)
    case "sub":
      return _affine(node, x, -1.0, c) if swapped else _affine(node, x, 1.0, -c)
    case "mul":
      return _affine(node, x, c, 0.0)
    case _:
      return _affine(node, x, 1 / c, 0.0)


def as_clip(node: Node) -> Clip | None:
  """A node as a pair of scalar bounds, if it is one."""
  if node.operation == "clamp":
    low, x, high = node.inputs
  elif node.operation in ("max", "min"):
    x, c = node.inputs
    if isinstance(x, np.ndarray):
      x, c = c, x
    ends = (c, np.inf) if node.operation == "max" else (-np.inf, c)
    low, high = map(np.asarray, ends)
  else:
    return None
  if not isinstance(x, Value) or x.dtype != np.float32:
    return None
  low, high = _scalar(low), _scalar(high)
  if low is None or high is None:
    return None
  return Clip(x, node.output, low, high)


def _scalar(c: Operand) -> float | None:
  """A constant of one element as a number."""
  if isinstance(c, np.ndarray) and c.size == 1:
    return float(c.reshape(())[()])
  return None


def per_channel(c: np.ndarray, x: Value) -> np.ndarray | None:
  """A constant as float64 [] or [channels], if it broadcasts to x like that."""
  if c.size == 1:
    return c.astype(np.float64).reshape(())
  if c.ndim != len(x.shape) or c.shape[-1] != c.size:
    return None
  return c.astype(np.float64).reshape(-1)


class Form(NamedTuple):
  """How a layer's input becomes codes; see Quantize."""

  gain: np.ndarray
  offset: np.ndarray
  low: int
  high: int
  scale: float


def quantizer(layer: Layer) -> Form | None:
  """What quantizes the input of a layer, if it has the form of Quantize.

  Its `integers` is traced as a network is: so whatever rounds once, to a
  uniform grid, has this form, by any method.
  """
  activation, params, index = (
    layer.activation,
    layer.input_params,
    layer.index,
  )
  if activation is None or activation.integers is None or activation.dynamic:
    return None
  integers = activation.integers
  graph = trace_function(
    lambda x: integers(params, x, index).codes,
    [jax.ShapeDtypeStruct((2,), jnp.float32)],
  )
  scale = integers(params, jnp.zeros((), jnp.float32), index).scale
  (here,) = graph.inputs
  gain, offset, low, high, rounded = 1.0, 0.0, -np.inf, np.inf, False
  for node in graph.nodes:
    if not any(operand is here for operand in node.inputs):
      return None
    if (step := as_affine(node)) is not None and not rounded:
      # Bounds so far are of the value that is now scaled.
      g, o = float(step.gain), float(step.offset)
      if g <= 0:
        return None
      gain, offset = gain * g, offset * g + o
      low, high = low * g + o, high * g + o
    elif (step := as_clip(node)) is not None:
      low, high = max(low, step.low), min(high, step.high)
    elif node.operation == "round" and int(node.params["rounding_method"]) == 1:
      rounded = True
      low, high = np.round(low), np.round(high)
    elif node.operation != "convert_element_type":
      return None
    here = node.output
  finite = np.isfinite(low) and np.isfinite(high)
  if not rounded or not finite or here is not graph.outputs[0]:
    return None
  if low < -128 or high > (255 if low >= 0 else 127):
    return None
  ends = int(low), int(high)
  return Form(np.asarray(gain), np.asarray(offset), *ends, float(scale))


def is_supported(node: Node) -> bool:
  """Whether a contraction has the form that integers are computed in."""
  params = node.params
  rank = len(node.inputs[0].shape)
  if node.operation == "dot_general":
    (left, right), batches = params["dimension_numbers"]
    last = [*left] == [rank - 1] and [*right] == [0]
    return last and not any(batches) and len(node.inputs[1].shape) == 2
  return (
    params["batch_group_count"] == 1
    and all(d == 1 for d in params["lhs_dilation"])
    and params["dimension_numbers"].lhs_spec[1] == rank - 1
    and params["dimension_numbers"].out_spec[1] == rank - 1
    and params["dimension_numbers"].rhs_spec[0] == rank - 1
  )


def _affine(node, x, gain, offset):
  gain, offset = np.asarray(gain, float), np.asarray(offset, float)
  return Affine(x, node.output, gain, offset)
