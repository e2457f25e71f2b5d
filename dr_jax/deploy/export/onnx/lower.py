"""From the primitives of a traced network to what ONNX Runtime computes fast.

Runs of elementwise primitives become single steps. A scale, a folded norm, a
bias and the reciprocal of the next scale are all gains and offsets, so that
whatever stands between two integer arrays is one gain and one offset per
channel. They are multiplied in float64 and rounded to float32 once.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dr_jax.deploy.export.graph import Graph, Layer, Node, Operand, Value
from dr_jax.deploy.export.onnx.forms import (
  as_affine,
  as_clip,
  is_supported,
  quantizer,
)
from dr_jax.deploy.export.onnx.steps import (
  Affine,
  Clip,
  Contract,
  Quantize,
  Step,
  Weight,
)

CONTRACTIONS = ("conv_general_dilated", "dot_general")


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


def _weight(node, layer):
  codes, scale = layer.weight.integers(layer.encoded, layer.index)
  scale = np.asarray(scale, np.float64)
  scale = scale.reshape(() if scale.size == 1 else -1)
  codes = np.asarray(codes)
  if codes.min() >= -128 and codes.max() <= 127:
    codes = codes.astype(np.int8)
  return Weight(node.output, node.params["layer"], codes, scale)


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
