"""What of a network is quantized, what stays float, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from flax import nnx

from dr_jax.nn import products
from dr_jax.nn.attention import Product
from dr_jax.nn.calibrate import calibrate, is_observed, observable
from dr_jax.nn.contraction import base_of, contraction_of, why_not
from dr_jax.nn.kernels import inside_float_wrappers, kernel_of
from dr_jax.nn.layer_table import aligned
from dr_jax.nn.leaves import name_of
from dr_jax.nn.quantized import quantized_layers
from dr_jax.nn.recorder import stack_of


class CoverageRow(NamedTuple):
  """One layer with a kernel, one product of attention, or a stack of them.

  Attributes:
    name: path in the model, with slashes; a product is "scores" (query x key)
      or "outputs" (softmax x value) of an attention function.
    kind: as in `LayerRow`, "product", or the name of its class.
    parameters: kernel entries.
    macs: multiply-accumulates for one example, of a product also those that a
      mask hides; None where it is nothing that can be quantized.
    reason: why it stays float; "" if it is quantized.
  """

  name: str
  kind: str
  parameters: int
  macs: int | None
  reason: str


class Coverage(tuple[CoverageRow, ...]):
  """Layers with a kernel and products; `print` shows a table with shares."""

  __slots__ = ()

  @property
  def macs(self) -> float:
    """Share of the multiply-accumulates of all rows that is quantized."""
    return _share((row.macs or 0, row.reason) for row in self)

  @property
  def parameters(self) -> float:
    """Share of kernel entries that is quantized."""
    return _share((row.parameters, row.reason) for row in self)

  def __str__(self) -> str:
    header = ("name", "kind", "parameters", "macs", "stays float")
    rows = (("-" if cell is None else str(cell) for cell in r) for r in self)
    return (
      f"{aligned([header, *rows])}\n"
      f"quantized: {100 * self.parameters:.1f} % of parameters of kernels, "
      f"{100 * self.macs:.1f} % of multiply-accumulates"
    )


def coverage(model: nnx.Module, network: nnx.Module, sample: Any) -> Coverage:
  """Lists layers with a kernel and products of attention: which are quantized.

  Of attention functions `nnx.dot_product_attention` is known; what other
  functions compute has no kernel and is not counted.

  Args:
    model: the float network.
    network: what `nn.quantize` made of it.
    sample: one batch, as for `nn.quantize`.

  >>> import jax.numpy as jnp
  >>> from dr_jax import nn, quant
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Sequential(
  ...   nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
  ... )
  >>> network = nn.quantize(
  ...   model,
  ...   weight=quant.double_rounding((8, 4)),
  ...   sample=jnp.ones((1, 4)),
  ...   skip="layers/1",
  ... )
  >>> print(nn.coverage(model, network, jnp.ones((1, 4))))
  name      kind    parameters  macs  stays float
  layers/0  linear  24          24
  layers/1  linear  12          12    skipped
  quantized: 66.7 % of parameters of kernels, 66.7 % of multiply-accumulates
  """
  model = nnx.clone(model)
  products.attach(model)
  multiplied = products.quantized_products(network)
  quantized = multiplied | {*quantized_layers(network)}
  found, known = [], observable(model)
  calls = calibrate(model, {}, sample)
  for name, call in calls.items():
    is_product = isinstance(call.module, Product)
    if base_of(call.module) is None and not is_product:
      continue
    skipped = "skipped" if multiplied or not is_product else "products=None"
    found.append(
      CoverageRow(
        name=name,
        kind="product" if is_product else contraction_of(call.module).kind,
        parameters=0 if is_product else kernel_of(call.module).size,
        macs=call.macs * math.prod(stack_of(call.module)),
        reason="" if name in quantized else skipped,
      )
    )
  for name, module in known.items():
    if name not in calls and base_of(module) is not None:
      kind, size = contraction_of(module).kind, kernel_of(module).size
      found.append(CoverageRow(name, kind, size, 0, "not called"))
  for name in products.unknown_functions(model):
    found.append(CoverageRow(name, "product", 0, None, "is another function"))
  for path, module, reason in float_layers(model):
    if (name := name_of(path)) not in known:
      kernel = getattr(module, "kernel", None)
      size = 0 if kernel is None else kernel.size
      found.append(CoverageRow(name, type(module).__name__, size, None, reason))
  return Coverage(found)


def float_layers(
  model: nnx.Module,
) -> Iterator[tuple[tuple[Any, ...], nnx.Module, str]]:
  """Yields the layers that `quantize` does not replace: path, layer, why."""
  inside = inside_float_wrappers(model)
  for path, module in nnx.iter_modules(model):
    if (wrapper := inside.get(id(module))) is not None:
      if is_observed(module):
        yield path, module, f"is in {wrapper}"
    elif is_observed(module):
      continue
    elif (reason := why_not(module)) is not None:
      yield path, module, reason
    elif isinstance(module, nnx.BatchNorm):
      yield path, module, "overrides __call__"
    elif _has_own_kernel(module):
      yield path, module, "is none of them"


def _has_own_kernel(module):
  return isinstance(getattr(module, "kernel", None), nnx.Param)


def _share(amounts) -> float:
  total = quantized = 0
  for amount, reason in amounts:
    total += amount
    quantized += 0 if reason else amount
  return quantized / total if total else 0.0
