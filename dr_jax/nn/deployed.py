"""A trained network as the parts that a deployment stores, and back.

`parts_of` takes a quantized network apart: codes and scales of its quantized
layers, folded norms, and whatever stays float. `assemble` builds a network from
these parts and the float architecture: it switches bit-widths from the stored
codes alone, without a float kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax.nn import layers
from dr_jax.nn.bits import Bits, Offset, Scale
from dr_jax.nn.kernels import computed_kernels
from dr_jax.nn.layers import quantized_layers
from dr_jax.nn.leaves import name_of, split_leaves, value_of, with_value
from dr_jax.nn.norm import BatchNorm, FoldedNorm
from dr_jax.nn.substitute import substitute
from dr_jax.quant import ActivationQuantizer, WeightQuantizer

# Parameters of a trained network are nowhere near; products stay finite.
LARGEST = 2.0**60


class StoredLayer(NamedTuple):
  """One quantized layer: its place, its quantizers, and what it stores.

  `first` is the position of the highest bit-width that `encoded` serves.
  """

  info: layers.LayerInfo
  shape: tuple[int, ...]
  weight: WeightQuantizer
  activation: ActivationQuantizer | None
  input_params: dict[str, jax.Array]
  encoded: dict[str, jax.Array]
  first: int = 0


class StoredNorm(NamedTuple):
  """One norm: numbers of the layers it follows, gain and offset [rows, c].

  Of n bit-widths there are n rows for (own,), or one if they share it, and
  n * n for (previous, own). `held` numbers the rows that are there, None for
  all; the others are NaN.
  """

  orders: tuple[int, ...]
  gain: jax.Array
  offset: jax.Array
  held: tuple[int, ...] | None = None


class Parts(NamedTuple):
  """All parts of a deployed network, by name.

  Attributes:
    layers: quantized layers, in call order.
    norms: batch norms, folded for inference.
    floats: every other variable, by slash path.
  """

  layers: dict[str, StoredLayer]
  norms: dict[str, StoredNorm]
  floats: dict[str, jax.Array]


def parts_of(model: nnx.Module) -> Parts:
  """Takes a quantized network apart; it is not changed.

  Raises:
    ValueError: if the model has no quantized layer, is assembled from parts
      itself, or a float layer shares the kernel of a quantized one.
  """
  found = quantized_layers(model)
  if not found:
    raise ValueError(
      "model must have a quantized layer; call nn.quantize first"
    )
  for name, layer in found.items():
    if isinstance(layer, layers.Stored):
      raise ValueError(
        f"layer {name} holds stored codes; pass what nn.quantize returned "
        "(copy an artifact as files)"
      )
  paths = {id(m): name_of(p) for p, m in nnx.iter_modules(model)}
  _check_kernels(model, found, paths)
  kernels = computed_kernels(model)
  stored = {
    name: StoredLayer(
      info=layers.LayerInfo(name, layer.order, layer.macs),
      shape=tuple(layer.kernel.shape),
      weight=layer.weight_quantizer,
      activation=layer.input_quantizer,
      input_params=layers.arrays_of(layer.input_params),
      encoded=layers.encode(layer, kernels[id(layer)]),
    )
    for name, layer in found.items()
  }
  norms = {
    paths[id(module)]: StoredNorm(module.orders, *module.fold())
    for _, module in nnx.iter_modules(model)
    if isinstance(module, BatchNorm)
  }
  inside = tuple(f"{name}/" for name in norms) + tuple(
    f"{paths[id(layer)]}/{part}".lstrip("/")  # a model can be one layer
    for layer in found.values()
    for part in ("kernel", "mask", "weight_params/", "input_params/")
  )
  floats = {
    name: _finite(name, leaf, value_of(leaf))
    for name, leaf in _leaves(model).items()
    if not name.startswith(inside)
  }
  return Parts(stored, norms, floats)


def assemble(model: nnx.Module, parts: Parts) -> nnx.Module:
  """Builds a deployed network, with its bits at the highest.

  Args:
    model: the float network that was quantized, with any weights; it is not
      changed.
    parts: what `parts_of` returned.

  Raises:
    ValueError: if the parts belong to another network; it names the first
      layer, norm or variable that does not fit.
  """
  model = nnx.clone(model)
  modules: dict[str, Any] = {
    name_of(path): module for path, module in nnx.iter_modules(model)
  }
  if type(model) in layers.STORED:  # a model can be one layer, without a path
    modules[type(model).__name__.lower()] = model
  replacements: dict[int, nnx.Module] = {}
  for name, part in parts.layers.items():
    layer: Any = modules.get(name)
    if type(layer) not in layers.STORED or layer.kernel.shape != part.shape:
      raise ValueError(
        f"layer {name} {part.shape} is not in this network; pass the network "
        "that was quantized"
      )
    stored = layers.STORED[type(layer)](
      layer,
      part.info,
      part.weight,
      part.activation,
      input_params=part.input_params,
      weight_arrays=part.encoded,
    )
    stored.first = part.first
    replacements[id(layer)] = stored
  for name, part in parts.norms.items():
    norm: Any = modules.get(name)
    wanted = part.gain.shape[-1:]
    fits = type(norm) is nnx.BatchNorm and norm.mean.shape == wanted
    if not fits or norm.var.dtype != part.gain.dtype:
      raise ValueError(
        f"norm {name} {part.gain.dtype} {wanted} is not in this network; pass "
        "the network that was quantized"
      )
    replacements[id(norm)] = FoldedNorm(
      norm, part.gain, part.offset, orders=part.orders, held=part.held
    )
  model = substitute(model, replacements)
  _write(model, parts.floats)
  model.eval()
  return model


def _check_kernels(model, found, paths):
  """Rejects a kernel that a float layer would lose."""
  kernels = {id(layer.kernel): name for name, layer in found.items()}
  for _, module in nnx.iter_modules(model):
    if not isinstance(module, layers.Quantized):
      for value in vars(module).values():
        if id(value) in kernels:
          raise ValueError(
            f"layer {paths[id(module)]} stays float and shares the kernel of "
            f"{kernels[id(value)]}; quantize both or neither"
          )


def _leaves(model) -> dict[str, Any]:
  left_out = nnx.Any(Bits, nnx.RngState)
  _, (_, kept) = split_leaves(model, left_out, ...)
  return {name_of(path): leaf for path, leaf in kept}


def is_within(array: np.ndarray, smallest: float, largest: float) -> bool:
  """Whether all values of an array are in a range, and none is NaN."""
  if not array.size:
    return True
  with np.errstate(invalid="ignore"):
    low, high = float(array.min()), float(array.max())
  return smallest <= low and high <= largest


def _finite(name, leaf, value):
  """The value; a parameter must be finite, other arrays (a mask) need not."""
  learned = isinstance(leaf, nnx.Param | nnx.BatchStat)
  floating = jnp.issubdtype(value.dtype, jnp.floating)
  if learned and floating:
    if not is_within(np.asarray(value), -LARGEST, LARGEST):
      raise ValueError(f"{name} must be finite, and at most 2^60 in size")
  return value


def _write(model, floats):
  floats = dict(floats)
  left_out = nnx.Any(Bits, nnx.RngState, layers.Encoded, Scale, Offset)
  _, (_, kept) = split_leaves(model, left_out, ...)
  writes = []
  for path, leaf in kept:
    name = name_of(path)
    if isinstance(leaf, nnx.BatchStat) and path[-1] in ("gain", "offset"):
      continue
    value = floats.pop(name, None)
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if value is None or (value.shape, value.dtype) != (leaf.shape, dtype):
      raise ValueError(
        f"{name} {dtype} {leaf.shape} is not among what was stored; pass the "
        "network that was quantized"
      )
    writes.append((path, with_value(leaf, _finite(name, leaf, value))))
  for name, value in floats.items():
    raise ValueError(
      f"{name} {value.dtype} {value.shape} was stored and is not in this "
      "network; pass the network that was quantized"
    )
  nnx.update(model, nnx.from_flat_state(writes))
