"""A trained network as the parts that a deployment stores, and back.

`parts_of` takes a quantized network apart: codes and scales of its quantized
layers, folded norms, scales of products, and whatever stays float. `assemble`
builds a network from these parts and the float architecture: it switches
bit-widths from the stored codes alone, without a float kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax.nn import layers
from dr_jax.nn.attention import QuantizedOperand
from dr_jax.nn.bits import Bits, Offset, Scale, arrays_of
from dr_jax.nn.calibrate import is_batch_norm
from dr_jax.nn.contraction import base_of, contraction_of
from dr_jax.nn.kernels import computed_kernels, kernel_of
from dr_jax.nn.leaves import name_of, split_leaves, value_of, with_value
from dr_jax.nn.norm import BatchNorm, FoldedNorm
from dr_jax.nn.products import attach, operands_of
from dr_jax.nn.quantized import (
  LayerInfo,
  Quantized,
  layer_rows,
  quantized_layers,
)
from dr_jax.nn.stored import Encoded, Stored, stored_class
from dr_jax.nn.substitute import substitute
from dr_jax.quant import ActivationQuantizer, WeightQuantizer

# Parameters of a trained network are nowhere near; products stay finite.
LARGEST = 2.0**60


class StoredLayer(NamedTuple):
  """One quantized layer: its place, its quantizers, and what it stores.

  `shape` is that of its kernel in columns (`contraction.Columns`); `first` is
  the position of the highest bit-width that `encoded` serves.
  """

  info: LayerInfo
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


class StoredOperand(NamedTuple):
  """An operand of a product: number of the layer it follows, its quantizer."""

  order: int
  activation: ActivationQuantizer
  input_params: dict[str, jax.Array]


class Parts(NamedTuple):
  """All parts of a deployed network, by name.

  Attributes:
    layers: quantized layers, in call order, those of a stack one by one.
    norms: batch norms, folded for inference, likewise.
    operands: those of products of attention that are quantized, likewise.
    floats: every other variable, by slash path.
  """

  layers: dict[str, StoredLayer]
  norms: dict[str, StoredNorm]
  operands: dict[str, StoredOperand]
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
    if isinstance(layer, Stored):
      raise ValueError(
        f"layer {name} holds stored codes; pass what nn.quantize returned "
        "(copy an artifact as files)"
      )
  paths = {id(m): name_of(p) for p, m in nnx.iter_modules(model)}
  _check_kernels(model, found, paths)
  kernels = computed_kernels(model)
  encoded = {
    name: layers.encode(layer, kernels[id(layer)])
    for name, layer in found.items()
  }
  stored = {
    row.name: StoredLayer(
      info=LayerInfo(row.name, order, row.layer.macs),
      shape=row.layer.columns.shape,
      weight=row.layer.weight_quantizer,
      activation=row.layer.input_quantizer,
      input_params=_at(arrays_of(row.layer.input_params), row.position),
      encoded=_at(encoded[row.layer.name], row.position),
    )
    for order, row in enumerate(layer_rows(model))
  }
  norms: dict[str, StoredNorm] = {}
  for _, module in nnx.iter_modules(model):
    if isinstance(module, BatchNorm):
      norms |= _stored_norms(paths[id(module)], module)
  operands: dict[str, StoredOperand] = {}
  for name, operand in operands_of(model):
    if isinstance(operand, QuantizedOperand):
      operands |= _stored_operands(name, operand)
  inside = tuple(
    f"{paths[id(module)]}/"
    for _, module in nnx.iter_modules(model)
    if isinstance(module, BatchNorm | QuantizedOperand)
  ) + tuple(
    f"{paths[id(layer)]}/{part}".lstrip("/")  # a model can be one layer
    for layer in found.values()
    for part in (
      *(contraction_of(layer).kernel, "mask"),
      *("weight_params/", "input_params/"),
    )
  )
  floats = {
    name: _finite(name, leaf, value_of(leaf))
    for name, leaf in _leaves(model).items()
    if not name.startswith(inside)
  }
  return Parts(stored, norms, operands, floats)


def _at(arrays, position):
  """Arrays of one layer of a stack."""
  return {name: array[position] for name, array in arrays.items()}


def _stored_norms(path, norm):
  """A norm, or those of a stack one by one."""
  gain, offset = norm.fold()
  stored = {}
  for position in np.ndindex(*gain.shape[:-2]):
    own = norm.bits.order
    if norm.bits.stack:
      own += int(np.ravel_multi_index(position, norm.bits.stack))
    orders = (*norm.orders[:-1], own)
    name = "/".join([path, *map(str, position)])
    stored[name] = StoredNorm(orders, gain[position], offset[position])
  return stored


def _stored_operands(path, operand):
  """An operand, or those of a stack one by one."""
  params, numbers = arrays_of(operand.input_params), operand.numbers
  return {
    "/".join([path, *map(str, position)]): StoredOperand(
      int(numbers[position]), operand.input_quantizer, _at(params, position)
    )
    for position in np.ndindex(*operand.stack)
  }


def assemble(model: nnx.Module, parts: Parts) -> nnx.Module:
  """Builds a deployed network, with its bits at the highest.

  Args:
    model: the float network that was quantized, with any weights; it is not
      changed.
    parts: what `parts_of` returned.

  Raises:
    ValueError: if the parts belong to another network; it names the first
      layer, norm, operand or variable that does not fit.
  """
  model = nnx.clone(model)
  # Where no operand is stored the network keeps its function.
  attach(model, parts.operands)
  modules: dict[str, Any] = {
    name_of(path): module for path, module in nnx.iter_modules(model)
  }
  if base_of(model) is not None:  # a model can be one layer, without a path
    modules[type(model).__name__.lower()] = model
  replacements: dict[int, nnx.Module] = {}
  unused = _replace_layers(modules, parts, replacements)
  unused += _replace_norms(modules, parts, replacements)
  unused += _replace_operands(model, parts, replacements)
  for kind, name, *about in unused:
    shown = " ".join(map(str, (kind, name, *about)))
    raise ValueError(
      f"{shown} is not in this network; pass the network that was quantized"
    )
  model = substitute(model, replacements)
  _write(model, parts.floats)
  model.eval()
  return model


def _replace_layers(modules, parts, replacements):
  """Puts layers in; returns those that the network has no place for."""
  rest = dict(parts.layers)
  for name, layer in modules.items():
    if base_of(layer) is None:
      continue
    contraction = contraction_of(layer)
    stack = contraction.stack(layer)
    names = _names(name, stack)
    shape = contraction.columns(layer).shape
    found = [rest[n] for n in names if n in rest]
    if len(found) < len(names) or any(part.shape != shape for part in found):
      continue
    for n in names:
      del rest[n]
    replacements[id(layer)] = _stored(layer, name, found, stack)
  return [("layer", name, part.shape) for name, part in rest.items()]


def _names(name, stack):
  return ["/".join([name, *map(str, p)]) for p in np.ndindex(*stack)]


def _stored(layer, name, parts, stack):
  first = parts[0]
  stored = stored_class(layer)(
    layer,
    first.info._replace(name=name, stack=stack),
    first.weight,
    first.activation,
    input_params=_stacked([part.input_params for part in parts], stack),
    weight_arrays=_stacked([part.encoded for part in parts], stack),
  )
  stored.first = max(part.first for part in parts)
  if stack:
    stored.place = Encoded(jnp.arange(len(parts)).reshape(stack))
  return stored


def _stacked(arrays, stack):
  """Arrays of the layers of a stack as those of one."""
  if not stack:
    return arrays[0]
  return jax.tree.map(
    lambda *xs: jnp.stack(xs).reshape(*stack, *jnp.shape(xs[0])), *arrays
  )


def _replace_norms(modules, parts, replacements):
  """Puts norms in; returns those that the network has no place for."""
  rest = dict(parts.norms)
  for name, norm in modules.items():
    if not is_batch_norm(norm):
      continue
    *stack, features = norm.mean.shape
    names = _names(name, stack)
    like = features, norm.var.dtype
    found = [rest[n] for n in names if n in rest]
    fits = all((p.gain.shape[-1], p.gain.dtype) == like for p in found)
    if len(found) < len(names) or not fits:
      continue
    for n in names:
      del rest[n]
    replacements[id(norm)] = _folded(norm, found, tuple(stack))
  return [
    ("norm", name, part.gain.dtype, part.gain.shape[-1:])
    for name, part in rest.items()
  ]


def _replace_operands(model, parts, replacements):
  """Puts operands in; returns those that the network has no place for."""
  rest = dict(parts.operands)
  for name, operand in operands_of(model):
    names = _names(name, operand.stack)
    found = [rest[n] for n in names if n in rest]
    if len(found) < len(names):
      continue
    for n in names:
      del rest[n]
    orders, stack = [part.order for part in found], operand.stack
    axes = stack if len(set(orders)) == len(orders) else ()
    replacements[id(operand)] = QuantizedOperand(
      found[0].activation,
      _stacked([part.input_params for part in found], stack),
      Bits.following(orders[0], axes),
      stack=stack,
    )
  return [("operand", name) for name in rest]


def _folded(norm, parts, stack):
  gain, offset = (
    _stacked([getattr(part, key) for part in parts], stack)
    for key in ("gain", "offset")
  )
  return FoldedNorm(
    norm,
    gain,
    offset,
    orders=parts[0].orders,
    held=_held(parts),
    stack=_own_stack(parts, stack),
  )


def _held(norms):
  """Rows that any of the norms of a stack holds; the others give NaN."""
  if any(part.held is None for part in norms):
    return None
  return tuple(sorted({row for part in norms for row in part.held}))


def _own_stack(norms, stack):
  """The axes of its bits, if each norm of a stack follows its own layer."""
  return stack if len({part.orders for part in norms}) == len(norms) else ()


def _check_kernels(model, found, paths):
  """Rejects a kernel that a float layer would lose."""
  kernels = {id(kernel_of(layer)): name for name, layer in found.items()}
  for _, module in nnx.iter_modules(model):
    if not isinstance(module, Quantized):
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
  left_out = nnx.Any(Bits, nnx.RngState, Encoded, Scale, Offset)
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
