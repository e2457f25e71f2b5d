"""Gives a trained multi-precision network another method or other norms."""

from __future__ import annotations

from flax import nnx

from dr_jax.nn import layers
from dr_jax.nn import norm as norms
from dr_jax.nn.bits import set_index
from dr_jax.nn.kernels import check_kernels, computed_kernels
from dr_jax.nn.quantized import candidates, layer_rows, quantized_layers
from dr_jax.nn.stored import Stored
from dr_jax.nn.substitute import substitute
from dr_jax.quant import WeightQuantizer


def requantize(
  model: nnx.Module,
  *,
  weight: WeightQuantizer | None = None,
  init: str = "published",
  norm: str | None = None,
) -> nnx.Module:
  """Returns a copy of a quantized network with other weights or norms.

  For curricula (first float weights, then quantized ones; first one bit-width
  for the whole network, then one for each layer) and for methods that quantize
  after training. Kernels, input quantizers, the bits in use and everything
  else stay as they are.

  Args:
    model: what `nn.quantize` returned; it is not changed.
    weight: another weight quantizer with the same bits; its parameters start
      from the present kernels. None keeps the present one.
    init: where its parameters start; see `quant.fit`.
    norm: None, or the kind that the norms have, keeps them. "transitional"
      turns "switchable" norms into transitional ones: each row (previous, own)
      starts as the present row own, parameters and statistics.

  Raises:
    ValueError: if the model is not quantized or holds stored codes, the bits
      of `weight` are others, `init` is unknown, a weight is NaN or infinite,
      or the norms cannot become `norm`.

  References:
    Bit-Mixer, ICCV 2021 (its three stages); arXiv 2502.01199, section 3.3.
  """
  bits = candidates(model)
  if weight is not None and weight.bits != bits:
    raise ValueError(
      f"weight.bits must be the bits of the network, {bits}, got {weight.bits}"
    )
  model = nnx.clone(model)
  found = quantized_layers(model)
  for name, layer in found.items():
    if isinstance(layer, Stored):
      raise ValueError(
        f"layer {name} holds stored codes; pass what nn.quantize returned"
      )
  if weight is not None:
    check_kernels(found)
    kernels = computed_kernels(model)
    params = layers.initial_params(
      dict.fromkeys(found, weight),
      {name: kernels[id(layer)] for name, layer in found.items()},
      init,
      stacks={name: layer.stack for name, layer in found.items()},
    )
    for name, layer in found.items():
      layer.set_weight_quantizer(weight, params[name])
  if norm is None:
    return model
  model = substitute(model, _replacements(model, norm, len(bits)))
  index = [row.layer.index_at(row.position) for row in layer_rows(model)]
  set_index(model, index)
  return model


def _replacements(model, kind, count):
  """The norms to replace, by identity, and what replaces them."""
  if kind not in norms.KINDS:
    raise ValueError(f"norm must be None or one of {norms.KINDS}, got {kind!r}")
  replacements = {}
  for _, module in nnx.iter_modules(model):
    if not isinstance(module, norms.BatchNorm) or module.kind == kind:
      continue
    if (module.kind, kind) != ("switchable", "transitional"):
      also = ", 'transitional'" if module.kind == "switchable" else ""
      raise ValueError(
        f"norm must be one of None, {module.kind!r}{also} for norms that are "
        f"{module.kind}, got {kind!r}"
      )
    replacements[id(module)] = norms.BatchNorm(
      module, kind=kind, candidates=count, order=module.bits.order
    )
  return replacements
