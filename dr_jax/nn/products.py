"""Puts attention whose products can be quantized into networks; names them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator

from flax import nnx

from dr_jax.nn.attention import (
  PRODUCTS,
  Attention,
  Operand,
  Product,
  QuantizedOperand,
)
from dr_jax.nn.contraction import base_of, contraction_of
from dr_jax.nn.leaves import name_of
from dr_jax.quant import ActivationQuantizer


def attach(model: nnx.Module, operands: Collection[str] | None = None) -> None:
  """Puts an Attention where a module holds `nnx.dot_product_attention`.

  Args:
    model: a float network, changed in place.
    operands: only where these are; None for everywhere.
  """
  for path, module in list(nnx.iter_modules(model)):
    for attribute, value in list(vars(module).items()):
      prefix = name_of((*path, attribute, ""))
      if value is nnx.dot_product_attention and (
        operands is None or any(o.startswith(prefix) for o in operands)
      ):
        attention = Attention(_stack(model, path))
        setattr(module, attribute, nnx.data(attention))


def detach_float(model: nnx.Module) -> None:
  """Puts the function back, in place, where no operand is quantized."""
  for _, module in list(nnx.iter_modules(model)):
    for attribute, value in list(vars(module).items()):
      if isinstance(value, Attention) and not any(
        isinstance(operand, QuantizedOperand)
        for operand in vars(value).values()
      ):
        setattr(module, attribute, nnx.static(nnx.dot_product_attention))


def operands_of(model: nnx.Module) -> Iterator[tuple[str, Operand]]:
  """Yields the operands of all attentions that `attach` put in, by name."""
  for path, module in nnx.iter_modules(model):
    if isinstance(module, Operand):
      yield name_of(path), module


def operands_in(product: str) -> list[str]:
  """Returns the names of the two operands of a product.

  >>> operands_in("block/attention_fn/outputs")
  ['block/attention_fn/weights', 'block/attention_fn/value']
  """
  *parents, own = product.split("/")
  return ["/".join([*parents, operand]) for operand in PRODUCTS[own]]


def quantized_products(model: nnx.Module) -> set[str]:
  """Returns the names of the products whose operands are both quantized."""
  modules = list(nnx.iter_modules(model))
  products = [name_of(p) for p, m in modules if isinstance(m, Product)]
  quantized = {
    name_of(p) for p, m in modules if isinstance(m, QuantizedOperand)
  }
  return {name for name in products if quantized.issuperset(operands_in(name))}


def quantizers_of(
  model: nnx.Module, products: ActivationQuantizer
) -> dict[str, ActivationQuantizer]:
  """Returns the quantizer of every operand; that of a softmax is unsigned."""
  return {
    name: products.with_sign(False) if name.endswith("weights") else products
    for name, _ in operands_of(model)
  }


def check_reach(model: nnx.Module, operands: Collection[str]) -> None:
  """Warns of products that stay float since their function is not known.

  Args:
    model: what `attach` changed.
    operands: names of those that are to be quantized.

  Raises:
    ValueError: if there are none.
  """
  unknown = list(unknown_functions(model))
  if not operands:
    raise ValueError(
      "products must be those of an nnx.dot_product_attention that a module "
      "holds as an attribute, as nnx.MultiHeadAttention does, but the model "
      f"has none that is not skipped; other attention functions: {unknown}"
    )
  if unknown:
    warnings.warn(
      f"products of these functions stay float: {', '.join(unknown)}; quantize "
      "knows those of nnx.dot_product_attention",
      stacklevel=3,
    )


def unknown_functions(model: nnx.Module) -> Iterator[str]:
  """Yields the names of attention functions that `attach` does not know."""
  for path, module in nnx.iter_modules(model):
    function = getattr(module, "attention_fn", None)
    known = function is nnx.dot_product_attention
    if callable(function) and not (known or isinstance(function, Attention)):
      yield name_of((*path, "attention_fn"))


def _stack(model, path):
  """Axes of the layers in the innermost module around a path that has some."""
  modules = dict(nnx.iter_modules(model))
  for end in range(len(path), -1, -1):
    inside = (
      nnx.iter_modules(modules[path[:end]]) if path[:end] in modules else ()
    )
    layers = [m for _, m in inside if base_of(m) is not None]
    if layers:
      return min((contraction_of(m).stack(m) for m in layers), key=len)
  return ()
