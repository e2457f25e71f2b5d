"""Writes a trained network as an artifact."""

from __future__ import annotations

import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax import nn, quant
from dr_jax.deploy.artifact.layout import (
  layout_of,
  packed_layout,
  plane_pieces,
)
from dr_jax.deploy.artifact.manifest import (
  FORMAT,
  MANIFEST,
  TENSORS,
  VERSIONS,
  check_manifest,
  manifest_digest,
)
from dr_jax.deploy.artifact.store import checksums_of, sha256_of
from dr_jax.deploy.artifact.tensor_file import dumps
from dr_jax.deploy.artifact.verify import checked_parts
from dr_jax.quant.core.grid import SCALE_MIN
from dr_jax.runtime import files


def save(
  path: str | os.PathLike,
  model: nnx.Module,
  *,
  architecture: tuple[str, dict[str, Any]] | None = None,
) -> None:
  """Writes the integer artifact of a quantized network.

  The directory appears complete or not at all.

  Args:
    path: directory to create.
    model: what `nn.quantize` returned, trained.
    architecture: (name, options) of `models.build`, so that `load` can build
      the network by itself; without it `load` must be given the network.

  Raises:
    FileExistsError: if the path exists; nothing is overwritten.
    ValueError: if the model is not quantized, its method is not registered or
      not that of all layers, or it has NaN, infinite or huge (above 2^60)
      values.

  >>> import tempfile
  >>> from dr_jax import deploy, quant
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Linear(4, 6, rngs=rngs)
  >>> network = nn.quantize(
  ...   model,
  ...   weight=quant.double_rounding((8, 4)),
  ...   sample=jnp.ones((1, 4)),
  ...   skip=(),
  ... )
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   deploy.save(f"{folder}/model", network)
  ...   stored = deploy.load(f"{folder}/model", model=model, bits=4)
  >>> nn.set_bits(network, 4)
  >>> bool((network(jnp.eye(4)) == stored(jnp.eye(4))).all())
  True
  """
  parts = nn.deployed.parts_of(model)
  _check_methods(parts)
  first = next(iter(parts.layers.values()))
  packed = {
    name: first.weight.storage.pack(layer.encoded)
    for name, layer in parts.layers.items()
  }
  manifest = _manifest(parts, packed, architecture)
  check_manifest(manifest | {"sha256": "0" * 64})
  layout = layout_of(manifest)
  tensors = _tensors(parts, packed, layout)
  pieces = _pieces(parts, packed, layout)
  checked_parts(manifest, layout, tensors, pieces)
  checksums, subchecksums = checksums_of(layout, pieces)
  sections = _sections(layout, pieces)
  header, data = dumps(tensors | checksums | sections | subchecksums)
  manifest["sha256"] = sha256_of(header, data, layout)
  manifest["manifest_sha256"] = manifest_digest(manifest)
  text = json.dumps(manifest, separators=(",", ":"))
  with files.atomic_directory(path) as directory:
    (directory / TENSORS).write_bytes(header + data)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def _check_methods(parts):
  """Raises ValueError if weights or inputs have several methods."""
  stored = (("weight", parts.layers), ("activation", parts.layers))
  for field, found in (*stored, ("activation", parts.operands)):
    specs: dict[str, str] = {}
    for name, layer in found.items():
      if (quantizer := getattr(layer, field)) is not None:
        specs.setdefault(json.dumps(_spec(quantizer)), name)
    if len(specs) > 1:
      (one, first), (other, second) = list(specs.items())[:2]
      raise ValueError(
        f"{field}s of layers must have one method to be stored, got {one} of "
        f"{first} and {other} of {second}"
      )


def _tensors(parts, packed, layout):
  """All tensors but sections."""
  tensors = {f"float/{name}": np.asarray(a) for name, a in parts.floats.items()}
  for joined, found in (
    (layout.inputs, parts.layers),
    (layout.operands, parts.operands),
  ):
    for key, tensor in joined.items():
      arrays = [
        _as_read(key, found[name].input_params[key]) for name in tensor.shapes
      ]
      tensors[tensor.name] = _joined(tensor.name, arrays)
  for key, tensor in layout.layers.items():
    arrays = [packed[name][key] for name in tensor.shapes]
    tensors[tensor.name] = _joined(tensor.name, arrays)
  return tensors


def _pieces(parts, packed, layout):
  """The pieces of all sections."""
  pieces = {}
  for name, norm in parts.norms.items():
    rows = np.stack([norm.gain, norm.offset], 1)
    pieces.update(zip(layout.row_pieces(name), rows, strict=True))
  if layout.weight.storage.planes:
    for name, arrays in packed.items():
      planes = arrays["codes"]
      pieces.update(zip(plane_pieces(name, len(planes)), planes, strict=True))
  return pieces


def _sections(layout, pieces):
  """The tensors that pieces are read from."""
  return {
    section.name: _joined(
      section.name, [pieces[section.name, name] for name in section.shapes]
    )
    for section in layout.sections
  }


def _as_read(key, value):
  # Whatever an optimizer made of a scale, it is read as a positive one.
  return jnp.maximum(value, SCALE_MIN) if key == "scale" else value


def _joined(name, arrays):
  """Arrays of one dtype, one after the other."""
  arrays = [np.asarray(array).reshape(-1) for array in arrays]
  dtypes = sorted({str(array.dtype) for array in arrays})
  if len(dtypes) > 1:
    raise ValueError(
      f"{name} must have one dtype for all layers and norms, got "
      f"{' and '.join(dtypes)}"
    )
  return np.concatenate(arrays)


def _manifest(parts, packed, architecture):
  first = next(iter(parts.layers.values()))
  streams = [
    key
    for key, like in packed_layout(first.weight, first.shape).items()
    if like is None
  ]
  manifest = {
    "format": FORMAT,
    "version": VERSIONS[bool(parts.operands)],
    "method": _spec(first.weight),
    "activation": _spec(
      next(filter(None, (p.activation for p in parts.layers.values())), None)
    ),
    "architecture": architecture,
    "layers": [
      {
        "name": layer.info.name,
        "macs": layer.info.macs,
        "shape": layer.shape,
        "signed": layer.activation and layer.activation.signed,
      }
      for layer in parts.layers.values()
    ],
    "streams": {
      key: [len(arrays[key]) for arrays in packed.values()] for key in streams
    },
    "norms": {
      name: {
        "follows": norm.orders,
        "rows": norm.gain.shape[0],
        "channels": norm.gain.shape[1],
      }
      for name, norm in parts.norms.items()
    },
  }
  return json.loads(json.dumps(manifest | _products(parts)))


def _products(parts):
  """What the manifest says of products of attention, if there are some."""
  if not parts.operands:
    return {}
  return {
    "products": _spec(next(iter(parts.operands.values())).activation),
    "operands": {
      name: {"follows": operand.order, "signed": operand.activation.signed}
      for name, operand in parts.operands.items()
    },
  }


def _spec(quantizer):
  if quantizer is None:
    return None
  if quantizer.name not in quant.NAMES:
    raise ValueError(
      f"quantizer must be registered to be stored (see quant.register), one of "
      f"{', '.join(quant.NAMES)}, got {quantizer.name!r}"
    )
  options = dict(quantizer.options)
  options.pop("signed", None)
  return {"name": quantizer.name, "options": options}
