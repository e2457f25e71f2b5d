"""The quantized layers of a network by name: their table, and their bits."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from dr_jax.nn.bits import set_index
from dr_jax.nn.contraction import contraction_of
from dr_jax.nn.norm import FoldedNorm, row_at
from dr_jax.nn.quantized import candidates, layer_rows
from dr_jax.nn.stored import Stored


class LayerRow(NamedTuple):
  """One quantized layer.

  Attributes:
    name: path in the model, with slashes.
    kind: "conv", "linear", "linear_general", "einsum", "conv_transpose",
      "embed" or "lora".
    shape: of the kernel, as [*window, c_in / groups, c_out] or [c_in, c_out].
    stride: of the window, the largest if its axes differ; 1 if linear.
    parameters: kernel entries (biases stay float and are not counted).
    macs: multiply-accumulates for one example.
    signed: sign of the input codes; None if inputs stay float.
    bits: bit-width in use.
  """

  name: str
  kind: str
  shape: tuple[int, ...]
  stride: int
  parameters: int
  macs: int
  signed: bool | None
  bits: int


class LayerTable(tuple[LayerRow, ...]):
  """The quantized layers in call order; `print` shows them as a table."""

  __slots__ = ()

  def __str__(self) -> str:
    return aligned([LayerRow._fields, *(map(str, row) for row in self)])


def aligned(rows: Iterable[Iterable[str]]) -> str:
  """Returns rows of words as lines, in columns."""
  cells = [tuple(row) for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return "\n".join(
    "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
    for row in cells
  )


def layer_table(model: nnx.Module) -> LayerTable:
  """Lists the quantized layers in call order: shapes, costs, signs, bits.

  Layers that stay float are not listed, so that a budget computed from the
  table counts only what is quantized.

  Args:
    model: what `nn.quantize` or `deploy.load` returned.

  >>> import jax.numpy as jnp
  >>> from dr_jax import nn, quant
  >>> rngs = nnx.Rngs(0)
  >>> layers = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
  >>> network = nn.quantize(
  ...   nnx.Sequential(*layers),
  ...   weight=quant.double_rounding((8, 4)),
  ...   sample=jnp.ones((1, 4)),
  ...   skip=(),
  ... )
  >>> print(nn.layer_table(network))
  name      kind    shape   stride  parameters  macs  signed  bits
  layers/0  linear  (4, 6)  1       24          24    None    8
  layers/1  linear  (6, 2)  1       12          12    None    8
  """
  rows = []
  for name, layer, position in layer_rows(model):
    shape = layer.columns.kernel_shape
    quantizer = layer.input_quantizer
    rows.append(
      LayerRow(
        name=name,
        kind=contraction_of(layer).kind,
        shape=shape,
        stride=int(np.max(getattr(layer, "strides", None) or 1)),
        parameters=math.prod(shape),
        macs=layer.macs,
        signed=None if quantizer is None else quantizer.signed,
        bits=layer.weight_quantizer.bits[layer.index_at(position)],
      )
    )
  return LayerTable(rows)


def kernel_paths(model: nnx.Module) -> dict[str, str]:
  """Returns {layer: path of its kernel} in the params of `nn.functional`.

  The float network has the same paths: `hessian.trace` selects by them.

  Args:
    model: what `nn.quantize` returned.

  Raises:
    ValueError: for a stack of layers, which has one kernel for all.

  >>> import jax.numpy as jnp
  >>> from dr_jax import nn, quant
  >>> network = nn.quantize(
  ...   nnx.Sequential(nnx.Embed(5, 4, rngs=nnx.Rngs(0)), nnx.relu),
  ...   weight=quant.double_rounding((8, 4)),
  ...   sample=jnp.ones((1, 2), int),
  ...   skip=(),
  ... )
  >>> nn.kernel_paths(network)
  {'layers/0': 'layers/0/embedding'}
  """
  paths = {}
  for name, layer, _ in layer_rows(model):
    if layer.stack:
      raise ValueError(
        f"model must not stack layers: {layer.name} has one kernel for "
        f"{math.prod(layer.stack)}"
      )
    paths[name] = f"{name}/{contraction_of(layer).kernel}"
  return paths


def set_bits(model: nnx.Module, bits: int | Mapping[str, int]) -> None:
  """Sets the bit-width of every quantized layer, in place.

  Norms follow the layer whose output they normalize, transitional ones also the
  quantized layer before it. Nothing is changed if anything is wrong.

  Args:
    model: what `nn.quantize` or `deploy.load` returned.
    bits: one bit-width for all layers, or {layer name: bit-width} with exactly
      the names of `layer_table(model)`.

  Raises:
    ValueError: for a bit-width that is not a candidate, unknown or missing
      names, which it lists, or bits for which a deployed layer or its norm
      holds too little (`deploy.open` with fewer bits).

  >>> import jax.numpy as jnp
  >>> from dr_jax import nn, quant
  >>> rngs = nnx.Rngs(0)
  >>> layers = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
  >>> network = nn.quantize(
  ...   nnx.Sequential(*layers),
  ...   weight=quant.double_rounding((8, 4)),
  ...   sample=jnp.ones((1, 4)),
  ...   skip=(),
  ... )
  >>> nn.set_bits(network, {"layers/0": 4, "layers/1": 8})
  >>> [row.bits for row in nn.layer_table(network)]
  [4, 8]
  """
  known = candidates(model)
  layers = [row.name for row in layer_rows(model)]
  if not isinstance(bits, Mapping):
    bits = dict.fromkeys(layers, bits)
  unknown = sorted(set(bits) - set(layers))
  missing = [name for name in layers if name not in bits]
  if unknown or missing:
    raise ValueError(
      f"bits must name exactly the layers {layers}, but has unknown "
      f"layers {unknown}, missing layers {missing}"
    )
  wrong = {name: b for name, b in bits.items() if not _is_one_of(b, known)}
  if wrong:
    name, b = next(iter(wrong.items()))
    raise ValueError(f"bits of {name} must be one of {known}, got {b!r}")
  _check_tied(model, bits)
  index = [known.index(bits[name]) for name in layers]
  _check_held(model, index)
  set_index(model, index)


def tied_layers(model: nnx.Module) -> list[tuple[str, ...]]:
  """Returns the groups of layers that must have the same bits, by name.

  These are stacks of layers (`nnx.scan`) whose bits are shared; see
  `nn.quantize`.
  """
  groups: dict[str, list[str]] = {}
  for name, layer, _ in layer_rows(model):
    if layer.shared:
      groups.setdefault(layer.name, []).append(name)
  return list(map(tuple, groups.values()))


def _is_one_of(value, bits):
  # 4.0 and True equal integers.
  known = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  return known and value in bits


def _check_tied(model, bits):
  """Raises ValueError where layers of a stack must have the same bits."""
  for first, *others in tied_layers(model):
    for name in others:
      if bits[name] != bits[first]:
        raise ValueError(
          f"bits of {name} must be those of {first}, {bits[first]}, with which "
          f"it shares them, got {bits[name]}"
        )


def _check_held(model, index):
  """Raises ValueError where codes or rows of a norm were not read."""
  layers = [row.layer for row in layer_rows(model)]
  for layer, position in zip(layers, index, strict=True):
    if isinstance(layer, Stored):
      layer.check_held(position)
  missing = [
    module
    for _, module in nnx.iter_modules(model)
    if isinstance(module, FoldedNorm)
    and row_at(module.orders, module.rows, index) not in module.held
  ]
  if missing:
    norm = min(missing, key=lambda norm: norm.bits.order)
    _raise_missing_row(norm, [layers[order] for order in norm.orders], index)


def _raise_missing_row(norm, layers, index):
  bits = layers[0].weight_quantizer.bits
  shape = (len(bits),) * len(layers)

  def shown(positions):
    asked = tuple(bits[position] for position in positions)
    return asked if len(asked) > 1 else asked[0]

  held = [shown(np.unravel_index(row, shape)) for row in norm.held]
  raise ValueError(
    f"bits of {' and '.join(layer.name for layer in layers)} must be one of "
    f"{tuple(held)}, for which the norm after it was read, got "
    f"{shown(index[order] for order in norm.orders)}; read more with "
    "artifact.upgrade"
  )
