"""Writes a trained network as an artifact."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from dr_jax import nn, quant
from dr_jax.deploy.artifact import (
  FORMAT,
  MANIFEST,
  TENSORS,
  VERSION,
  manifest_digest,
)
from dr_jax.deploy.manifest import check_manifest
from dr_jax.deploy.verify import check_tensors
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
    ValueError: if the model is not quantized, its method is not registered, or
      it has NaN, infinite or huge (above 2^60) values.

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
  packed = {
    name: layer.weight.storage.pack(layer.encoded)
    for name, layer in parts.layers.items()
  }
  arrays = _arrays(parts, packed)
  # safetensors reads no bfloat16 into numpy: its bits travel as uint16.
  halves = [name for name, a in arrays.items() if a.dtype == jnp.bfloat16]
  data = safetensors.numpy.save(
    arrays | {name: arrays[name].view(np.uint16) for name in halves}
  )
  manifest = _manifest(parts, packed, architecture) | {
    "bfloat16": halves,
    "sha256": hashlib.sha256(data).hexdigest(),
  }
  manifest = json.loads(json.dumps(manifest))
  first = next(iter(parts.layers.values()))
  check_manifest(manifest)
  check_tensors(manifest, arrays, first.weight, first.activation)
  manifest["manifest_sha256"] = manifest_digest(manifest)
  text = json.dumps(manifest, separators=(",", ":"))
  with files.atomic_directory(path) as directory:
    (directory / TENSORS).write_bytes(data)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def _arrays(parts, packed):
  """All tensors by name."""
  tensors = {}
  for name, layer in parts.layers.items():
    for key, value in packed[name].items():
      tensors[f"{name}/{key}"] = value
    for key, value in layer.input_params.items():
      # Whatever an optimizer made of a scale, it is read as a positive one.
      read = jnp.maximum(value, SCALE_MIN) if key == "scale" else value
      tensors[f"{name}/input/{key}"] = read
  for name, norm in parts.norms.items():
    tensors[f"{name}/gain"], tensors[f"{name}/offset"] = norm.gain, norm.offset
  for name, value in parts.floats.items():
    tensors[f"float/{name}"] = value
  return {name: np.asarray(value) for name, value in tensors.items()}


def _manifest(parts, packed, architecture):
  first = next(iter(parts.layers.values()))
  return {
    "format": FORMAT,
    "version": VERSION,
    "method": _spec(first.weight),
    "activation": _spec(first.activation),
    "architecture": architecture,
    "layers": [
      {
        "name": layer.info.name,
        "order": layer.info.order,
        "macs": layer.info.macs,
        "shape": layer.shape,
        "signed": layer.activation and layer.activation.signed,
        "packed": list(packed[name]),
        "input": list(layer.input_params),
      }
      for name, layer in parts.layers.items()
    ],
    "norms": {name: norm.orders for name, norm in parts.norms.items()},
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
