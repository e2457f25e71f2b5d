"""Integer weights and rules from and to qwix (github.com/google/qwix).

A qwix.QArray is integers and scales in the layout of the kernel,

  kernel = qvalue * scale,   scale 1 along every axis that is summed over,

which is what `WeightQuantizer.integers` says of a layer at one bit-width. Needs
qwix: pip install "dr_jax[qwix]".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from dr_jax.nn.contraction import contraction_of
from dr_jax.nn.kernels import computed_kernels, kernel_of
from dr_jax.nn.layers import encode
from dr_jax.nn.leaves import name_of
from dr_jax.nn.quantized import Quantized, layer_rows, quantized_layers
from dr_jax.nn.stored import Stored
from dr_jax.quant import code_range


def to_qarrays(network: nnx.Module) -> dict[str, qwix.QArray]:
  """Returns the weights of the quantized layers at the bits in use.

  Args:
    network: what `nn.quantize` or `deploy.load` returned.

  Returns:
    {layer: QArray in the shape of its kernel}, those of a stack one by one;
    float32 scales, of each channel or of all. Codes are qwix's integers of the
    layer's bit-width, or int8 where a method has others at that bit-width.

  Raises:
    ValueError: if there is no quantized layer, a method's weights are not
      integers times a scale, or do not fit int8.

  >>> from dr_jax import nn, quant
  >>> network = nn.quantize(
  ...   nnx.Linear(3, 2, rngs=nnx.Rngs(0)),
  ...   weight=quant.double_rounding((8, 4)),
  ...   sample=jnp.ones((1, 3)),
  ...   skip=(),
  ... )
  >>> nn.set_bits(network, 4)
  >>> (weight,) = to_qarrays(network).values()
  >>> weight.qvalue.dtype, weight.shape, weight.scale.shape
  (dtype(int4), (3, 2), (1, 2))
  """
  found = {}
  for name, layer, position, encoded in _encoded(network):
    index = layer.index_at(position)
    if isinstance(layer, Stored):
      layer.check_held(index)
    found[name] = _qarray(name, layer, encoded, index)
  if not found:
    raise ValueError(
      "network must have a quantized layer; call nn.quantize first"
    )
  return found


def from_qarrays(
  network: nnx.Module, qarrays: Mapping[str, qwix.QArray]
) -> nnx.Module:
  """Returns a copy of a network with the weights of QArrays.

  At the highest bit-width its kernels are exactly qvalue * scale; lower ones
  follow by the rule of its method. Everything else stays as it is.

  Args:
    network: what `nn.quantize` returned, by a method that learns a scale.
    qarrays: {layer: QArray in the shape of its kernel}, with exactly the names
      of `nn.layer_table(network)`, as `qarrays_of` returns them.

  Raises:
    ValueError: for unknown or missing layers, another shape, a zero point, a
      scale that is not float32 or that differs within a channel, or integers
      that the method does not have at its highest bit-width.
  """
  rows = layer_rows(network)
  names = [row.name for row in rows]
  unknown = sorted(set(qarrays) - set(names))
  missing = [name for name in names if name not in qarrays]
  if unknown or missing:
    raise ValueError(
      f"qarrays must name exactly the layers {names}, but has unknown layers "
      f"{unknown}, missing layers {missing}"
    )
  network = nnx.clone(network)
  for name, layer, position in layer_rows(network):
    _check(name, layer, qarrays[name])
    _fill(layer, position, qarrays[name])
  for name, layer, _, encoded in _encoded(network):
    _compare(name, layer, _qarray(name, layer, encoded, 0), qarrays[name])
  return network


def qarrays_of(model: nnx.Module) -> dict[str, qwix.QArray]:
  """Returns the weights of a network that qwix quantized, by layer.

  Args:
    model: what `qwix.quantize_model` returned with a `qwix.PtqProvider`.
  """
  found = {}
  for path, module in nnx.iter_modules(model):
    for value in vars(module).values():
      array = getattr(value, "array", None)
      if isinstance(array, qwix.QArray):
        fields = (array.qvalue, array.scale, array.zero_point)
        arrays = (a if a is None else jnp.asarray(a[...]) for a in fields)
        found[name_of(path)] = qwix.QArray(*arrays, array.qtype)
  return found


def rules(
  allocation: Mapping[str, int],
  *,
  inputs: Mapping[str, int] | None = None,
  **options: Any,
) -> list[qwix.QuantizationRule]:
  """Returns rules by which qwix quantizes these layers alone.

  Bits are taken over, scales are not: qwix calibrates its own. It quantizes no
  lookup (nnx.Embed), and convolutions only with inputs of the same bits; layers
  of a stack (nnx.scan) have one path there, which no rule for one of them
  matches. `provider.get_unused_rules()` returns the rules that matched nothing.

  Args:
    allocation: {layer: bits of its weights}, as `allocate.Allocation`.
    inputs: {layer: bits of its inputs}; those of other layers stay float.
    **options: further arguments of every `qwix.QuantizationRule`.

  Raises:
    ValueError: for bits outside 2..8, or inputs of a layer that is not in the
      allocation.

  >>> for rule in rules({"conv1": 8, "head": 3}, inputs={"conv1": 8}):
  ...   print(rule.module_path, rule.weight_qtype, rule.act_qtype)
  conv1 int8 int8
  head int3 None
  """
  inputs = inputs or {}
  if unknown := sorted(set(inputs) - set(allocation)):
    raise ValueError(
      f"inputs must be of the layers {list(allocation)}, got {unknown}"
    )
  return [
    qwix.QuantizationRule(
      module_path=re.escape(layer),
      weight_qtype=_qtype(f"allocation[{layer!r}]", bits),
      act_qtype=(
        _qtype(f"inputs[{layer!r}]", inputs[layer]) if layer in inputs else None
      ),
      **options,
    )
    for layer, bits in allocation.items()
  ]


def _qtype(field, bits):
  if isinstance(bits, bool) or bits not in range(2, 9):
    raise ValueError(f"{field} must be in 2..8, got {bits!r}")
  return f"int{bits}"


def _encoded(
  network: nnx.Module,
) -> Iterator[tuple[str, Quantized, tuple[int, ...], dict[str, jax.Array]]]:
  """Yields name, layer, position in a stack, and stored arrays of each."""
  kernels = computed_kernels(network)
  stored: dict[str, dict[str, jax.Array]] = {}
  for name, layer in quantized_layers(network).items():
    if isinstance(layer, Stored):
      stored[name] = layer.arrays()
    else:
      stored[name] = encode(layer, kernels[id(layer)])
  for name, layer, position in layer_rows(network):
    arrays = stored[layer.name].items()
    yield name, layer, position, {key: a[position] for key, a in arrays}


def _qarray(name, layer, encoded, index):
  """The weight of a layer at a position of its bits."""
  method, columns = layer.weight_quantizer, layer.columns
  if method.integers is None:
    raise ValueError(
      f"layer {name!r} must have weights that are integers times a scale, "
      f"which {method.name} has not"
    )
  codes, scale = method.integers(encoded, index)
  inner = (
    _inner_axes(layer) if jnp.size(scale) > 1 else range(len(columns.axes))
  )
  scale = columns.back(jnp.broadcast_to(scale, columns.shape))
  scale = scale[tuple(_first(axis in inner) for axis in range(scale.ndim))]
  low, high = int(codes.min()), int(codes.max())
  for bits in (max(method.bits[index], 2), 8):
    smallest, largest = code_range(bits)
    if smallest <= low and high <= largest:
      codes = columns.back(codes).astype(jnp.int4 if bits <= 4 else jnp.int8)
      return qwix.QArray(codes, scale, None, f"int{bits}")
  raise ValueError(
    f"layer {name!r} must have integers that fit int8; those of {method.name} "
    f"at {method.bits[index]} bits are in {low}..{high}"
  )


def _inner_axes(layer):
  """The axes of its kernel that a layer sums over."""
  channels = contraction_of(layer).channels(layer)
  return [a for a in range(len(layer.columns.axes)) if a not in channels]


def _first(only):
  return slice(1) if only else slice(None)


def _check(name, layer, qarray):
  """Raises ValueError for what no layer of this kind could hold."""
  field, shape = f"qarrays[{name!r}]", layer.columns.kernel_shape
  if isinstance(layer, Stored):
    raise ValueError(
      f"network must be what nn.quantize returned; {name} holds stored codes"
    )
  if not isinstance(qarray, qwix.QArray):
    raise ValueError(f"{field} must be a qwix.QArray, got {type(qarray)}")
  dtype, scale = qarray.qvalue.dtype, qarray.scale
  if qarray.shape != shape or not jnp.issubdtype(dtype, jnp.signedinteger):
    raise ValueError(
      f"{field} must be signed integers in the shape of the kernel, {shape}, "
      f"got {dtype} {qarray.shape}"
    )
  if qarray.zero_point is not None:
    raise ValueError(f"{field} must have no zero point")
  inner = _inner_axes(layer)
  allowed = [{1} if a in inner else {1, n} for a, n in enumerate(shape)]
  fits = all(n in of for n, of in zip(scale.shape, allowed, strict=True))
  if scale.dtype != jnp.float32 or not fits:
    each = tuple(1 if a in inner else n for a, n in enumerate(shape))
    raise ValueError(
      f"{field} must have a float32 scale of each channel, {each}, or of all, "
      f"got {scale.dtype} {scale.shape}"
    )


def _fill(layer, position, qarray):
  """Sets kernel and scale of a layer, or of one of a stack."""
  method, columns = layer.weight_quantizer, layer.columns
  weight = qarray.qvalue.astype(jnp.float32) * qarray.scale
  params = method.init(columns.of(weight))
  if "scale" not in params:
    raise ValueError(
      f"network must have a method that learns a scale, got {method.name}"
    )
  rank, own = len(columns.shape), params["scale"]
  scale = columns.of(jnp.broadcast_to(qarray.scale, qarray.shape))
  scale = scale[tuple(_first(n == 1) for n in own.shape[-rank:])]
  params["scale"] = scale if own.ndim == rank else own.at[0].set(scale)
  arrays = {key: (layer.weight_params[key], a) for key, a in params.items()}
  for variable, array in (*arrays.values(), (kernel_of(layer), weight)):
    value = variable[...].at[position].set(array.astype(variable.dtype))
    variable[...] = value


def _compare(name, layer, got, wanted):
  """Raises ValueError unless a layer has the integers it was given."""
  method = layer.weight_quantizer
  codes = np.asarray(got.qvalue, np.int32), np.asarray(wanted.qvalue, np.int32)
  wrong = np.sum(codes[0] != codes[1])
  if wrong or (np.asarray(got.scale) != np.asarray(wanted.scale)).any():
    raise ValueError(
      f"qarrays[{name!r}] must be integers and scales that {method.name} has "
      f"at {method.bits[0]} bits; {wrong} of {codes[0].size} integers would "
      "be others, or the scale"
    )
