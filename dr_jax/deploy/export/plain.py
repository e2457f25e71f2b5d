"""The integers of one assignment as a plain safetensors file, as PyTorch reads.

A layer stage1/block0/conv1 becomes

  stage1.block0.conv1.weight        integers [c_out, c_in / groups, *window], or
                                    [out, in] of a linear layer
  stage1.block0.conv1.weight_scale  float32 [c_out]: weight = integer * scale
  stage1.block0.conv1.input_scale   float32 [1], unless its input stays float
  stage1.block0.conv1.bias          if it has one

An operand of a product of attention (`nn.quantize`, products) has its
input_scale, as block0.attention.attention_fn.query.input_scale.

There is no zero point: the integers of all methods are symmetric. A batch norm
is folded; it is x * weight + bias, stored as one that normalizes nothing:

  norm.weight, norm.bias                 float32 [c], gain and offset
  norm.running_mean, norm.running_var    zeros and ones, with eps = 0

What stays float has its name and PyTorch's layout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dr_jax.deploy.artifact import Artifact
from dr_jax.nn.deployed import StoredLayer, StoredNorm, StoredOperand
from dr_jax.nn.norm import row_at
from dr_jax.runtime import files


def export_safetensors(
  path: str | os.PathLike, artifact: Artifact, *, bits: int | Mapping[str, int]
) -> None:
  """Writes the integers of an artifact at one assignment as a plain file.

  The file appears complete or not at all. Its metadata has "format": "pt",
  "method" and "activation" (name and options, with the rounding), and "layers",
  JSON {layer: {"bits": ..., "input_codes": [lowest, highest]}}; where products
  of attention are quantized, "products" and "operands" likewise.

  Args:
    path: file to create.
    artifact: what `deploy.open` returned.
    bits: one bit-width for all layers, or {layer: bits}.

  Raises:
    FileExistsError: if the path exists; nothing is overwritten.
    ValueError: if `bits` are not the layers and candidates of the artifact, its
      method or its activation has no integers, or two arrays would have the
      same name.
  """
  if not isinstance(artifact, Artifact):
    raise ValueError(
      f"artifact must be what deploy.open returned, got {artifact!r}"
    )
  artifact = artifact.upgrade(bits)  # reads what they need
  opened, parts = artifact.opened, artifact.parts
  index = [artifact.bits.index(b) for b in opened.values()]
  tensors, layers = _Tensors(), {}
  for (name, layer), i in zip(parts.layers.items(), index, strict=True):
    tensors.add(name, _weight(layer, i))
    codes = None
    if layer.activation is not None:
      scale, codes = _input(layer, i)
      tensors.add(name, {"input_scale": scale})
    layers[_dotted(name)] = {"bits": opened[name], "input_codes": codes}
  operands = {}
  for name, operand in parts.operands.items():
    scale, codes = _input(operand, index[operand.order])
    tensors.add(name, {"input_scale": scale})
    bits_of = artifact.bits[index[operand.order]]
    operands[_dotted(name)] = {"bits": bits_of, "input_codes": codes}
  for name, norm in parts.norms.items():
    tensors.add(name, _norm(norm, index))
  for name, value in parts.floats.items():
    layer, _, leaf = name.rpartition("/")
    tensors.add(layer, _float(leaf, np.asarray(value)))
  manifest = artifact.manifest
  fields = {key: manifest[key] for key in ("method", "activation")}
  fields["layers"] = layers
  if operands:
    fields |= {"products": manifest["products"], "operands": operands}
  spec = {key: json.dumps(value) for key, value in fields.items()}
  metadata = {"format": "pt", **spec}
  files.create_bytes(path, safetensors.numpy.save(tensors.by_name, metadata))


class _Tensors:
  """Tensors by the names that they have in PyTorch."""

  def __init__(self):
    self.by_name: dict[str, np.ndarray] = {}

  def add(self, layer: str, tensors: Mapping[str, np.ndarray]) -> None:
    for leaf, tensor in tensors.items():
      name = _dotted(f"{layer}/{leaf}".lstrip("/"))
      if name in self.by_name:
        raise ValueError(f"two arrays would have the name {name}")
      self.by_name[name] = np.ascontiguousarray(tensor)


def _dotted(name):
  return name.replace("/", ".")


def _weight(layer: StoredLayer, index):
  quantizer = layer.weight
  if quantizer.integers is None:
    raise ValueError(f"method {quantizer.name} has no integers to export")
  codes, scale = map(np.asarray, quantizer.integers(layer.encoded, index))
  channels = codes.shape[-1]
  return {
    "weight": _output_first(codes),
    "weight_scale": np.broadcast_to(scale.reshape(-1), (channels,)),
  }


def _input(layer: StoredLayer | StoredOperand, index):
  """The scale of an input, and its lowest and its highest code."""
  quantizer: Any = layer.activation
  if quantizer.integers is None:
    raise ValueError(f"activation {quantizer.name} has no integers to export")
  if quantizer.dynamic:
    raise ValueError(f"activation {quantizer.name} has no scale to export")
  ends = jnp.array([-1e30, 1e30], jnp.float32)
  codes, scale = quantizer.integers(layer.input_params, ends, index)
  return np.asarray(scale).reshape(1), codes.tolist()


def _norm(norm: StoredNorm, index):
  row = row_at(norm.orders, len(norm.gain), index)
  gain, offset = np.asarray(norm.gain[row]), np.asarray(norm.offset[row])
  return {
    "weight": gain,
    "bias": offset,
    "running_mean": np.zeros_like(gain),
    "running_var": np.ones_like(gain),
  }


def _float(leaf, value):
  """A float variable under PyTorch's name for it, in PyTorch's layout."""
  if leaf == "kernel" and value.ndim > 1:
    return {"weight": _output_first(value)}
  return {"weight" if leaf in ("scale", "embedding") else leaf: value}


def _output_first(kernel):
  """[*window, c_in, c_out] as [c_out, c_in, *window]."""
  axes = range(kernel.ndim)
  return kernel.transpose(axes[-1], axes[-2], *axes[:-2])
