"""What sample batches show of every layer: order, cost, sign, statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax import quant
from dr_jax.nn.attention import Operand, Product
from dr_jax.nn.contraction import base_of
from dr_jax.nn.inputs import Inputs
from dr_jax.nn.kernels import check_kernels, inside_float_wrappers
from dr_jax.nn.leaves import name_of
from dr_jax.nn.recorder import Statistics, observe


class Call(NamedTuple):
  """What calibration saw of one module.

  Attributes:
    module: the float module.
    macs: multiply-accumulates for one example, over all its calls; of one
      layer, if it stands for several.
    signed: sign of the input codes; None if it has no float inputs.
    params: initial parameters of the input quantizer at that sign, stacked as
      the layer is.
    source: name of the layer whose output it was first called on, if any.
    stack: axes of the bits that it can have; see `LayerInfo`.
  """

  module: Any
  macs: int
  signed: bool | None
  params: dict[str, jax.Array]
  source: str | None
  stack: tuple[int, ...]


def calibrate(
  model: nnx.Module,
  activations: Mapping[str, quant.ActivationQuantizer | None],
  sample: Any,
  *,
  init: str = "published",
  batches: Iterable[Any] = (),
) -> dict[str, Call]:
  """Runs sample batches through the float network.

  Args:
    model: the float network.
    activations: quantizers by layer or operand; floats where there is none.
    sample: the first batch; it alone says what is called, and at what cost.
    init: where parameters start; see `quant.fit`.
    batches: further ones.

  Returns:
    What each layer that can be quantized, each operand and product of an
    Attention and each nnx.BatchNorm saw, in the order of first calls; nothing
    of those that the first batch does not reach.
  """
  modules = observable(model)
  check_kernels({n: m for n, m in modules.items() if base_of(m) is not None})
  inputs = [Inputs.of(sample), *map(Inputs.of, batches)]
  seen = observe(model, modules, activations, init, inputs)
  calls = {}
  for name, found in seen.items():
    signed, params = _settled(
      name, found.statistics, activations.get(name), init
    )
    calls[name] = Call(
      modules[name], found.macs, signed, params, found.source, found.stack
    )
  return calls


def observable(model: nnx.Module) -> dict[str, Any]:
  """The modules that calibration observes, by name."""
  float_inside = inside_float_wrappers(model)
  return {
    name_of(path) or type(module).__name__.lower(): module
    for path, module in nnx.iter_modules(model)
    if is_observed(module) and id(module) not in float_inside
  }


def is_observed(module: Any) -> bool:
  """Whether a module can be quantized, or is a norm to give rows."""
  known = base_of(module) is not None or is_batch_norm(module)
  return known or isinstance(module, Operand | Product)


def is_batch_norm(module: Any) -> bool:
  """Whether a module is an nnx.BatchNorm, or computes as one."""
  kind = type(module)
  return issubclass(kind, nnx.BatchNorm) and (
    kind.__call__ is nnx.BatchNorm.__call__
  )


def _settled(name, statistics: Statistics | None, activation, init):
  """Sign of a layer's input, and the parameters of that sign."""
  if statistics is None:  # it has no float input
    return None, {}
  finite, low, high, by_sign = statistics
  if not np.all(finite):
    raise ValueError(
      f"sample must make finite inputs, but that of layer {name!r} is NaN or "
      "infinite"
    )
  signed = bool(np.any(low < 0))
  if activation is not None and activation.signed is not None:
    signed = activation.signed
  params = by_sign.get(signed, {})
  if init == "max" and activation is not None and signed in by_sign:
    of_range = activation.with_sign(signed).from_range
    if of_range is not None:
      for _ in np.shape(low):
        of_range = jax.vmap(of_range)
      params = of_range(low, high)
  return signed, jax.tree.map(jnp.asarray, params)
