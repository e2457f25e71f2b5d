"""Float weights from the state dict of a PyTorch network in safetensors.

  conv       [out, in/groups, kh, kw]  ->  kernel [kh, kw, in/groups, out]
  linear     [out, in]                 ->  kernel [in, out], or of heads
                                           [in, heads, d] and [heads, d, out]
  embedding  [tokens, features]        ->  the same
  norm       weight, bias, running_mean, running_var  ->  scale, bias, mean, var

Such a file is what `safetensors.torch.save_file(network.state_dict(), path)`
writes. Its running variances are unbiased ones, which for batches of thousands
of pixels is the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from dr_jax.interop.torch_names import Table, table_of

# A norm's counter of batches, which averages do not need.
_IGNORED = ".num_batches_tracked"
# How many names an error lists.
_SHOWN = 3


def load_weights(model: nnx.Module, weights: str | os.PathLike) -> None:
  """Fills a float network with the weights of its counterpart in PyTorch.

  Every parameter and running statistic is set, and every tensor of the file is
  used exactly once. Tensors of other floating-point types become that of the
  parameter. What no shape shows must be that of the network by itself: the
  number of heads, strides, the base of rotations (10,000), a norm's epsilon.

  Args:
    model: changed in place, or not at all if something is wrong. One of
      `models.ImageNetResNet` without `preactivation` and `models.MobileNetV2`
      (names of torchvision), `models.ResNet` (names of kuangliu's pytorch-cifar
      with PreActBlock, and "bn" for the last norm), `models.ViT` (timm's
      names) or `models.Transformer` (names of LlamaForCausalLM of Hugging
      Face).
    weights: path of a safetensors file; a leading "~" is expanded.

  Raises:
    ValueError: if there is no counterpart, or the file is missing, damaged, or
      of another network; one line names the tensors.
  """
  shown = f"weights={os.fspath(weights)!r}"
  table = table_of(model)
  if table is None:
    raise ValueError(
      f"{shown}: PyTorch has no network like this {type(model).__name__}; it "
      "has ImageNetResNet with preactivation=False, MobileNetV2, ResNet, ViT "
      "and Transformer"
    )
  targets = _targets(model, table)
  tensors = _read(os.path.expanduser(weights), shown)
  if faults := _faults(targets, tensors):
    raise ValueError(
      f"{shown} must have the tensors of {table.owner} in the sizes of this "
      f"{type(model).__name__}: {'; '.join(faults)}"
    )
  for name, target in targets.items():
    ends = np.cumsum([part.shape[0] for part in target.parts])
    pieces = np.split(tensors[name], ends[:-1])
    for part, piece in zip(target.parts, pieces, strict=True):
      part.write(piece)


class _Part(NamedTuple):
  """What a tensor, or a part of one, holds.

  Attributes:
    variable: of the network.
    axes: its axes, in the order of the tensor.
    shape: of the part.
  """

  variable: nnx.Variable
  axes: tuple[int, ...]
  shape: tuple[int, ...]

  def write(self, piece: np.ndarray) -> None:
    ordered = piece.reshape([self.variable.shape[a] for a in self.axes])
    value = ordered.transpose(np.argsort(self.axes))
    self.variable[...] = jnp.asarray(value, self.variable[...].dtype)


class _Target(NamedTuple):
  """The parts of one tensor, along its first axis."""

  parts: tuple[_Part, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    count = sum(part.shape[0] for part in self.parts)
    return (count, *self.parts[0].shape[1:])


def _targets(model: nnx.Module, table: Table) -> dict[str, _Target]:
  """What each tensor holds, by its name."""
  placed = [
    (place, name + suffix, part)
    for path, suffix, part in _parts(model)
    for name, place in [table.name_of(path)]
  ]
  found: dict[str, list[_Part]] = {}
  for _, name, part in sorted(placed, key=lambda found: found[0]):
    found.setdefault(name, []).append(part)
  return {name: _Target(tuple(parts)) for name, parts in found.items()}


# Attributes of layers by torch's names; the others are called as in torch.
_ATTRIBUTES = {
  "kernel": "weight",
  "embedding": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
}


def _parts(model: nnx.Module) -> Iterator[tuple[str, str, _Part]]:
  """Yields all variables: path of the layer, suffix of the name, part."""
  modules = dict(nnx.iter_modules(model))
  for path, variable in nnx.iter_graph(model):
    if not isinstance(variable, nnx.Param | nnx.BatchStat):
      continue
    layer, attribute = modules[path[:-1]], str(path[-1])
    if layer is model:  # it stands alone
      yield attribute, "", _as_is(variable)
      continue
    part = _kernel(layer) if attribute == "kernel" else _as_is(variable)
    if attribute == "bias":
      part = part._replace(shape=(variable[...].size,))
    suffix = _ATTRIBUTES.get(attribute, attribute)
    yield "/".join(map(str, path[:-1])), f".{suffix}", part


def _as_is(variable):
  return _Part(variable, tuple(range(variable.ndim)), variable.shape)


def _kernel(layer: Any) -> _Part:
  """Outputs come first in torch, then inputs, then a window."""
  shape = layer.kernel.shape
  if isinstance(layer, nnx.Conv):
    axes: tuple[int, ...] = (3, 2, 0, 1)
    return _Part(layer.kernel, axes, tuple(shape[a] for a in axes))
  inner = 1
  if isinstance(layer, nnx.LinearGeneral):
    inner = len(layer.in_features)
  axes = (*range(inner, len(shape)), *range(inner))
  matrix = math.prod(shape[inner:]), math.prod(shape[:inner])
  return _Part(layer.kernel, axes, matrix)


def _faults(
  targets: dict[str, _Target], tensors: dict[str, np.ndarray]
) -> list[str]:
  """What is wrong with the tensors of a file, with names."""
  both = [name for name in targets if name in tensors]
  kinds = {
    "missing": [name for name in targets if name not in tensors],
    "unknown": [name for name in tensors if name not in targets],
    "of another shape": [
      f"{name} {list(tensors[name].shape)} instead of "
      f"{list(targets[name].shape)}"
      for name in both
      if tensors[name].shape != targets[name].shape
    ],
    "not finite floating-point numbers": [
      name
      for name, tensor in tensors.items()
      if not jnp.issubdtype(tensor.dtype, jnp.floating)
      or not np.isfinite(tensor).all()
    ],
  }
  return [f"{kind}: {_shortened(n)}" for kind, n in kinds.items() if n]


def _read(weights, shown):
  """The tensors of a file by name, without the counters."""
  try:
    tensors = safetensors.numpy.load_file(weights)
  except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
    raise ValueError(
      f"{shown} must be a safetensors file, and cannot be read: {error}"
    ) from None
  return {n: a for n, a in tensors.items() if not n.endswith(_IGNORED)}


def _shortened(names):
  more = len(names) - _SHOWN
  return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
