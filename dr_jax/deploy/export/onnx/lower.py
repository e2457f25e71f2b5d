"""From the primitives of a traced network to what ONNX Runtime computes fast.

Runs of elementwise primitives become single steps, each in one normal form:

  Affine    y = gain * x + offset, per channel (the last axis)
  Clip      y = min(max(x, low), high)
  Quantize  codes = clip(round(gain * x + offset), low, high)
  Contract  y = gain * (codes * weight codes) + offset, a convolution or product

A scale, a folded norm, a bias and the reciprocal of the next scale are all
gains and offsets, so that whatever stands between two integer arrays is one
gain and one offset per channel. They are multiplied in float64 and rounded to
float32 once.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.deploy.export.graph import (
  Graph,
  Layer,
  Node,
  Operand,
  Value,
  trace_function,
)

CONTRACTIONS = ("conv_general_dilated", "dot_general")


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


class _Uses:
  """How often values are read."""

  def __init__(self, graph: Graph):
    self._counts: dict[int, int] = {}
    for node in graph.nodes:
      for x in node.inputs:
        self._counts[id(x)] = self._counts.get(id(x), 0) + 1
    for x in graph.outputs:
      self._counts[id(x)] = self._counts.get(id(x), 0) + 1

  def is_read_once(self, value: Value) -> bool:
    return self._counts.get(id(value)) == 1


def lower(graph: Graph, layers: dict[str, Layer], *, fuse: bool) -> list[Step]:
  """Returns the steps of a graph, in order.

  Args:
    graph, layers: what `graph.trace` returned.
    fuse: whether a contraction that only a quantizer reads requantizes.
  """
  lowering = _Lowering(graph, layers, fuse)
  for node in graph.nodes:
    lowering.add(node)
  return lowering.needed(graph.outputs)


class _Lowering:
  """Steps so far, by the value that they compute."""

  def __init__(self, graph, layers, fuse):
    self._layers, self._fuse = layers, fuse
    self._uses = _Uses(graph)
    self._steps: dict[int, Step] = {}

  def add(self, node: Node) -> None:
    """Appends the step of a node, which may take in the step before it."""
    if node.operation == "quantize":
      self._quantize(node)
    elif node.operation == "weight":
      self._put(_weight(node, self._layers[node.params["layer"]]))
    elif node.operation in CONTRACTIONS:
      self._put(self._contract(node) or node)
    else:
      step = as_affine(node) or as_clip(node) or node
      if isinstance(step, Affine):
        step = self._after(step)
      self._put(step)

  def needed(self, outputs):
    needed = {id(x) for x in outputs}
    kept = []
    for step in reversed(self._steps.values()):
      if id(step.output) in needed:
        kept.append(step)
        needed |= set(map(id, _inputs(step)))
    return kept[::-1]

  def _put(self, step):
    self._steps[id(step.output)] = step

  def _before(self, x) -> Step | None:
    """The step that computes x, if nothing else reads it."""
    return self._steps.get(id(x)) if self._uses.is_read_once(x) else None

  def _after(self, step: Affine) -> Step:
    before = self._before(step.x)
    gain, offset = step.gain, step.offset
    if isinstance(before, Affine):
      return Affine(
        before.x,
        step.output,
        before.gain * gain,
        before.offset * gain + offset,
      )
    if isinstance(before, Contract) and before.requantize is None:
      return dataclasses.replace(
        before,
        output=step.output,
        gain=before.gain * gain,
        offset=before.offset * gain + offset,
      )
    return step

  def _contract(self, node):
    x, w = (self._steps.get(id(operand)) for operand in node.inputs)
    if isinstance(x, Contract):
      x = x.requantize
    if not (isinstance(x, Quantize) and isinstance(w, Weight)):
      return None
    if w.codes.dtype != np.int8 or not is_supported(node):
      return None
    channels = node.output.shape[-1]
    gain = np.broadcast_to(w.scale * x.scale, channels)
    return Contract(x, w, node, node.output, gain, np.zeros(channels))

  def _quantize(self, node):
    (x,) = node.inputs
    name = node.params["layer"]
    form = quantizer(self._layers[name])
    assert form is not None, name
    step = Quantize(x, node.output, name, *form)
    step, alone = self._without_clips(step)
    before = self._before(step.x)
    if isinstance(before, Affine):
      step = step._replace(
        x=before.x,
        gain=before.gain * step.gain,
        offset=before.offset * step.gain + step.offset,
      )
    elif self._fuse and alone and isinstance(before, Contract):
      fused = dataclasses.replace(
        before,
        output=step.output,
        gain=before.gain * step.gain,
        offset=before.offset * step.gain + step.offset,
        requantize=step,
      )
      self._put(fused)
      return
    self._put(step)

  def _without_clips(self, step: Quantize) -> tuple[Quantize, bool]:
    """Makes bounds of x bounds of its codes: rounding is monotone.

    Returns:
      The step, and whether nothing else reads what it passed over.
    """
    alone = True
    while isinstance(before := self._steps.get(id(step.x)), Clip):
      ends = [
        float(np.round(np.float32(end * step.gain + step.offset)))
        for end in (before.low, before.high)
      ]
      low, high = max(step.low, ends[0]), min(step.high, ends[1])
      if low > high:
        break
      alone = alone and self._uses.is_read_once(step.x)
      step = step._replace(x=before.x, low=int(low), high=int(high))
    return step, alone


def _inputs(step: Step) -> tuple[Operand, ...]:
  if isinstance(step, Node):
    return step.inputs
  if isinstance(step, Contract):
    return step.quantize.output, step.weight.output
  return () if isinstance(step, Weight) else (step.x,)


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
  if activation is None or activation.integers is None:
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


def _weight(node, layer):
  codes, scale = layer.weight.integers(layer.encoded, layer.index)
  scale = np.asarray(scale, np.float64)
  scale = scale.reshape(() if scale.size == 1 else -1)
  codes = np.asarray(codes)
  if codes.min() >= -128 and codes.max() <= 127:
    codes = codes.astype(np.int8)
  return Weight(node.output, node.params["layer"], codes, scale)


def _affine(node, x, gain, offset):
  gain, offset = np.asarray(gain, float), np.asarray(offset, float)
  return Affine(x, node.output, gain, offset)


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
