"""Writes a deployed network as an ONNX file with its integers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from dr_jax import nn
from dr_jax.deploy.artifact import Artifact
from dr_jax.deploy.export import graph as graphs
from dr_jax.deploy.export.onnx import weights
from dr_jax.deploy.export.onnx.builder import MICROSOFT, Builder
from dr_jax.deploy.export.onnx.emit import Emitter, derived
from dr_jax.deploy.export.onnx.forms import quantizer
from dr_jax.deploy.export.onnx.lower import lower
from dr_jax.runtime import files

ARITHMETICS = ("exact", "fused")
OPSET = 21
# By weight type.
_SMALLEST_OPSET = {"int8": 18, "int4": 21, "int2": 25}
WEIGHT_TYPES = tuple(_SMALLEST_OPSET)
INPUT, OUTPUT = "input", "output"


def export_onnx(
  path: str | os.PathLike,
  network: nnx.Module | Artifact,
  sample_shape: Sequence[int],
  *,
  bits: int | Mapping[str, int] | None = None,
  opset: int = OPSET,
  arithmetic: str = "exact",
  weight_type: str = "int8",
) -> dict[str, np.ndarray]:
  """Writes a network at one assignment of bit-widths as an ONNX file.

  Weights are the integer codes of that bit-width, inputs of quantized layers
  become codes by QuantizeLinear, and both meet between DequantizeLinear and a
  Conv or MatMul, which ONNX Runtime computes in integers. The file has one
  input, "input", float32 [batch, *sample_shape], and one output, "output"; the
  batch size is open.

  Args:
    path: the file.
    network: what `deploy.load` or `deploy.open` returned, or a float network;
      it is not changed.
    sample_shape: of one example, without the batch axis: (32, 32, 3).
    bits: one bit-width, or {layer: bits}; None for those in use.
    opset: of the standard operators, 18 or more.
    arithmetic: "exact" computes what the network computes: sums in integers,
      and what stands between in float32. "fused" lets a convolution whose
      output only the next layer's codes are made of give them directly, with
      an integer bias: up to 5 bits the codes stay the same, at 8 bits a few
      move by one. It also uses operators that only ONNX Runtime has.
    weight_type: the narrowest type for codes that fit into it: "int8", "int4"
      (opset 21) or "int2" (opset 25). Kernels are widened when the file is
      loaded; with "fused", linear layers of float input stay packed
      (MatMulNBits).

  Returns:
    {layer: bool [c_out]} of the layers that give codes directly: the channels
    where all codes are exact, whatever the input. Empty for "exact".

  Raises:
    ImportError: if the onnx package is not installed.
    ValueError: for another arithmetic or weight type, an opset that is too old
      for it, or bits that are not candidates.
    GraphError: naming what of the network has no counterpart in ONNX.

  References:
    ONNX QuantizeLinear, DequantizeLinear; ONNX Runtime, "Quantize ONNX models"
    (the QDQ format).
  """
  check(opset, arithmetic, weight_type)
  network = _at_bits(network, bits)
  builder = Builder()
  builder.unique(INPUT)
  source = weights.SOURCES[weight_type]
  added = add_network(builder, network, sample_shape, arithmetic, source)
  builder.add("Identity", added.name, output=OUTPUT)
  save(path, builder, {INPUT: added.x}, added.y, opset)
  return added.exact


class Added(NamedTuple):
  """A network among the nodes of a builder.

  Attributes:
    x, y: its input and output.
    name: of the output.
    exact: what `export_onnx` returns.
  """

  x: graphs.Value
  y: graphs.Value
  name: str
  exact: dict[str, np.ndarray]


def add_network(
  builder: Builder,
  network: nnx.Module,
  sample_shape: Sequence[int],
  arithmetic: str,
  source: weights.Source | None,
) -> Added:
  """Adds the nodes of a network, which reads `INPUT`.

  Args:
    builder: takes them.
    network, sample_shape, arithmetic: as in `export_onnx`.
    source: where weight codes come from; None for what layers store, for every
      bit-width.
  """
  fused = arithmetic == "fused"
  layers = _integer_layers(network)
  graph = graphs.trace(network, sample_shape, layers=layers)
  emitter = Emitter(builder, source or derived(layers), microsoft=fused)
  emitter.packs_products = fused and source in weights.PACKED
  (x,) = graph.inputs
  emitter.put(x, INPUT)
  for step in lower(graph, layers, fuse=fused):
    emitter.emit(step)
  y = graph.outputs[0]
  if len(graph.outputs) != 1 or not isinstance(y, graphs.Value):
    raise graphs.GraphError(
      f"network must return one array, got {len(graph.outputs)}"
    )
  return Added(x, y, emitter.tensor(y), emitter.exact)


def check(opset: int, arithmetic: str, weight_type: str = "int8") -> None:
  """Raises the errors of `export_onnx` that need no network."""
  if importlib.util.find_spec("onnx") is None:
    raise ImportError("ONNX files need onnx: pip install 'dr_jax[onnx]'")
  import onnx

  if arithmetic not in ARITHMETICS:
    raise ValueError(
      f"arithmetic must be one of {', '.join(ARITHMETICS)}, got {arithmetic!r}"
    )
  if weight_type not in _SMALLEST_OPSET:
    raise ValueError(
      f"weight_type must be one of {', '.join(_SMALLEST_OPSET)}, got "
      f"{weight_type!r}"
    )
  smallest = _SMALLEST_OPSET[weight_type]
  newest = onnx.defs.onnx_opset_version()
  if not isinstance(opset, int) or not smallest <= opset <= newest:
    raise ValueError(
      f"opset must be in {smallest}..{newest} for {weight_type} weights, got "
      f"{opset!r}"
    )


def _at_bits(network, bits):
  if isinstance(network, Artifact):
    return network.load(bits=bits)
  if bits is None:
    return network
  network = nnx.clone(network)
  nn.set_bits(network, bits)
  return network


def _integer_layers(network) -> dict[str, graphs.Layer]:
  """The quantized layers; without quantizers that have no integers."""
  found = {}
  for name, layer in graphs.stored_layers(network).items():
    if layer.weight is not None and layer.weight.integers is None:
      layer = layer._replace(weight=None)
    if quantizer(layer) is None:
      layer = layer._replace(activation=None)
    found[name] = layer
  return found


def save(
  path: str | os.PathLike,
  builder: Builder,
  inputs: Mapping[str, Any],
  y: graphs.Value,
  opset: int,
) -> None:
  """Writes the file, once ONNX has checked it."""
  import onnx

  opsets = [onnx.helper.make_opsetid("", opset)]
  if any(node.domain == MICROSOFT for node in builder.nodes):
    opsets.append(onnx.helper.make_opsetid(MICROSOFT, 1))
  model = onnx.helper.make_model(
    onnx.helper.make_graph(
      builder.nodes,
      "network",
      [info(name, x) for name, x in inputs.items()],
      [info(OUTPUT, y)],
      list(builder.initializers.values()),
    ),
    opset_imports=opsets,
    ir_version=onnx.helper.find_min_ir_version_for(opsets, True),
    producer_name="dr_jax",
  )
  onnx.checker.check_model(model, full_check=True)
  files.write_bytes(path, model.SerializeToString())


def info(name: str, value: Any) -> Any:
  """An input or output of a graph, with its shape and dtype."""
  import onnx

  shape = [d if isinstance(d, int) else str(d) for d in value.shape]
  kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
  return onnx.helper.make_tensor_value_info(name, kind, shape)
