"""Turns any Flax NNX network into a multi-precision one.

One or more calibration batches go through the float network; what each layer
saw (sign, statistics, order, cost) decides how it is quantized. The converted
network has the same attributes, parameter names and call signature.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flax import nnx

from dr_jax import quant
from dr_jax.nn import layers
from dr_jax.nn import norm as norms
from dr_jax.nn import products as known_products
from dr_jax.nn.attention import Product, QuantizedOperand
from dr_jax.nn.bits import Bits
from dr_jax.nn.calibrate import calibrate, is_batch_norm, observable
from dr_jax.nn.contraction import CONTRACTIONS, base_of
from dr_jax.nn.coverage import float_layers
from dr_jax.nn.followed import followed_layers
from dr_jax.nn.kernels import computed_kernels
from dr_jax.nn.leaves import name_of
from dr_jax.nn.quantized import LayerInfo, quantized_layers
from dr_jax.nn.recorder import stack_of
from dr_jax.nn.rules import Quantizers, Rule, resolve
from dr_jax.nn.substitute import substitute
from dr_jax.quant import ActivationQuantizer, WeightQuantizer

STACK_BITS = ("own", "shared")

Skip = str | Callable[[Sequence[str]], Iterable[str]]


def first_and_last(names: Sequence[str]) -> tuple[str, ...]:
  """Skip rule: the first and the last layer in call order stay float.

  >>> first_and_last(["stem", "conv1", "conv2", "head"])
  ('stem', 'head')
  """
  return (names[0], names[-1])


def quantize(
  model: nnx.Module,
  *,
  weight: WeightQuantizer,
  activation: ActivationQuantizer | None = None,
  sample: Any,
  batches: Iterable[Any] = (),
  init: str | tuple[str, str] = "published",
  norm: str = "switchable",
  stack_bits: str = "own",
  products: ActivationQuantizer | None = None,
  rules: Iterable[Rule] = (),
  skip: Skip | Iterable[Skip] = first_and_last,
) -> nnx.Module:
  """Returns a multi-precision copy of a Flax NNX network.

  Every nnx.Conv (grouped, depthwise, dilated, strided), nnx.ConvTranspose,
  nnx.Linear, nnx.LinearGeneral (so nnx.MultiHeadAttention), nnx.Einsum,
  nnx.Embed, nnx.LoRALinear and nnx.BatchNorm is replaced, wherever it is
  stored and inside whatever transformation it is called; so are subclasses that
  compute as these do. The model itself is left unchanged. Other layers with a
  kernel and what is inside an nnx.SpectralNorm stay float, and a warning names
  them and says why. A norm follows the bits of the layer whose output it
  normalizes, else of the last one called before it. Starts at the highest
  bit-width; see `nn.set_bits`.

  Args:
    model: the float network, preferably trained.
    weight: weight quantizer, e.g. `quant.double_rounding((8, 6, 4, 2))`.
    activation: input quantizer with the same bits, or None for float inputs.
      A sign left open is settled per layer: signed where an input was
      negative.
    sample: one calibration batch, an array [batch, ...], or a tuple of all
      positional arguments of the model's `__call__`, or `nn.Inputs` with
      keyword arguments, as `nn.Inputs(x, deterministic=True)`.
    batches: further ones, each as `sample`. Signs and ranges are those of all,
      other initial parameters their mean over the batches.
    init: where the parameters of weight and input quantizers start, or a pair
      (weights, inputs): "published", as the method's paper says, to train from;
      "mse", "percentile" or "max" (see `quant.fit`), better ones where the
      network is used without training.
    norm: how many sets of parameters and statistics a batch norm has.
      "switchable": one per bit-width of the layer it follows (arXiv
      1812.08928). "transitional": one per bit-width of the quantized layer
      called before that one and its own, for layers of different bit-widths
      (Bit-Mixer, ICCV 2021; arXiv 2502.01199, section 3.3); one per own
      bit-width if it follows the first. Call order alone decides which layer
      is the one before, also at residual joins and shortcuts. "shared": one
      set for all. `nn.requantize` turns the first kind into the second.
    stack_bits: bits of layers that are stacked (nnx.scan or nnx.vmap over
      parameters with leading axes; every layer has scales of its own): "own",
      each its own; "shared", the same for all of a stack, as they must be where
      the transformation passes other variables than nnx.Param whole.
    products: quantizer, with the same bits, of both sides of the two products
      of attention, query x key and softmax x value; None leaves them float. It
      reaches functions `nnx.dot_product_attention` that a module holds as an
      attribute, as nnx.MultiHeadAttention does; a warning names others. Each of
      the four sides has scales of its own, unsigned ones for the softmax, and
      follows bits as norms do: of the layer whose output it is, else of the
      last one called before. Products compute with fake-quantized floats,
      whatever the backend. In `skip` they are "PATH/attention_fn/scores" and
      "PATH/attention_fn/outputs".
    rules: quantizers of single layers with the same bits, pairs of a glob
      pattern and what it changes: `("head/*", {"activation": None})` leaves
      inputs float, `("stage1/*", {"weight": quant.lsq(bits)})` takes another
      method. Later rules win. (An artifact has one method for all weights.)
    skip: layers that stay float: names, glob patterns ("head/*"), functions
      from the layer names in call order to names, or a sequence of these. A
      layer that the model holds and does not call has to be one of them.

  Raises:
    ValueError: if bit-widths differ or `norm`, `init` or `stack_bits` is
      unknown; if the model is not an nnx.Module, is quantized already or
      nothing is left to quantize, or two layers have the same path; if a skip
      or a rule matches no layer; if weights or inputs are NaN or infinite; if
      the sample does not reach a layer; if a layer has inputs of a sign that
      the activation cannot quantize; if stacked layers have transitional norms;
      if `products` reaches none.

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
  >>> nn.candidates(network), network(jnp.ones((3, 4))).shape
  ((8, 4), (3, 2))
  """
  for field, quantizer in (("activation", activation), ("products", products)):
    if quantizer is not None:
      _check_activation(field, quantizer, weight.bits)
  if norm not in norms.KINDS:
    raise ValueError(f"norm must be one of {norms.KINDS}, got {norm!r}")
  if stack_bits not in STACK_BITS:
    raise ValueError(
      f"stack_bits must be one of {STACK_BITS}, got {stack_bits!r}"
    )
  inits = (init, init) if isinstance(init, str) else tuple(init)
  if len(inits) != 2 or set(inits) - set(quant.INITS):
    raise ValueError(
      f"init must be one of {quant.INITS}, or a pair of them, got {init!r}"
    )
  _check_model(model)
  model = nnx.clone(model)
  quantizers = resolve(
    rules,
    Quantizers(weight, activation),
    [name for name, m in observable(model).items() if base_of(m) is not None],
  )
  activations = {name: q.activation for name, q in quantizers.items()}
  if products is not None:
    known_products.attach(model)
    activations |= known_products.quantizers_of(model, products)
  calls = calibrate(model, activations, sample, init=inits[1], batches=batches)
  names = [n for n, call in calls.items() if base_of(call.module) is not None]
  found = [n for n, call in calls.items() if isinstance(call.module, Product)]
  uncalled = [name for name in observable(model) if name not in calls]
  skipped = _skipped(skip, names, [*found, *uncalled]) if names else set()
  if unseen := [name for name in uncalled if name not in skipped]:
    raise ValueError(
      f"sample must reach every layer, but does not reach {unseen}; if the "
      "model does not call them, name them in skip"
    )
  quantized = [name for name in names if name not in skipped]
  if not quantized:
    raise ValueError(
      f"skip must leave a layer to quantize; the model's layers are {names}"
    )
  operands = {
    name
    for product in found
    if product not in skipped
    for name in known_products.operands_in(product)
  }
  if products is not None:
    known_products.check_reach(model, operands)
  _warn_of_float_layers(model)
  kernels = computed_kernels(model)
  params = layers.initial_params(
    {name: quantizers[name].weight for name in quantized},
    {name: kernels[id(calls[name].module)] for name in quantized},
    inits[0],
    stacks={name: stack_of(calls[name].module) for name in quantized},
  )
  follows = followed_layers(calls, quantized)
  replacements: dict[int, nnx.Module] = {}
  for name, call in calls.items():
    if name in quantized:
      info = LayerInfo(
        name,
        follows[name].order,
        call.macs,
        follows[name].stack,
        shared=_shares_bits(call, stack_bits),
      )
      replacements[id(call.module)] = layers.quantized_class(call.module)(
        call.module,
        info,
        quantizers[name].weight,
        _settled(quantizers[name].activation, call, name),
        input_params=call.params,
        weight_arrays=params[name],
      )
    elif is_batch_norm(call.module):
      replacements[id(call.module)] = norms.BatchNorm(
        call.module,
        kind=norm,
        candidates=len(weight.bits),
        order=follows[name].order,
        stack=follows[name].stack,
      )
    elif name in operands:
      replacements[id(call.module)] = QuantizedOperand(
        _settled(activations[name], call, name),
        call.params,
        Bits.following(*follows[name]),
        stack=call.module.stack,
      )
  model = substitute(model, replacements)
  known_products.detach_float(model)
  return model


def _check_activation(field, quantizer, bits):
  if not isinstance(quantizer, ActivationQuantizer):
    raise ValueError(
      f"{field} must be a quant.ActivationQuantizer or None, got "
      f"{type(quantizer).__name__}"
    )
  if quantizer.bits != bits:
    raise ValueError(
      f"{field}.bits must be the bits of weight, {bits}, got {quantizer.bits}"
    )


def _check_model(model):
  if not isinstance(model, nnx.Module):
    raise ValueError(
      "model must be a flax.nnx.Module, got "
      f"{type(model).__module__}.{type(model).__qualname__}"
    )
  if quantized_layers(model):
    raise ValueError("model must be a float network, but is quantized already")
  paths: dict[str, tuple] = {}
  for path, _ in nnx.iter_modules(model):
    other = paths.setdefault(name_of(path), path)
    if other != path:
      raise ValueError(
        f"model must have one layer at {name_of(path)!r}, but has "
        f"{other} and {path}: leave '/' out of the keys"
      )


def _shares_bits(call, stack_bits):
  return bool(stack_of(call.module)) and (
    stack_bits == "shared" or not call.stack
  )


def _settled(activation, call, name) -> Any:
  """The activation at the sign that a layer needs."""
  if activation is None or call.signed is None:
    return None
  try:
    return activation.with_sign(call.signed)
  except ValueError as error:
    raise ValueError(f"input of layer {name!r}: {error}") from error


def _warn_of_float_layers(model):
  left = [
    f"{name_of(path)} ({type(module).__name__}, {reason})"
    for path, module, reason in float_layers(model)
  ]
  if left:
    known = ", ".join(f"nnx.{kind.__name__}" for kind in CONTRACTIONS)
    warnings.warn(
      f"these layers stay as they are: {', '.join(left)}; quantize replaces "
      f"{known} and nnx.BatchNorm, subclasses that compute as these do, and "
      "nothing inside nnx.SpectralNorm",
      stacklevel=3,
    )


def _skipped(skip, names, others) -> set[str]:
  """Resolves skip rules to names; a rule that matches nothing raises.

  Products and layers that are not called match patterns alone: functions choose
  among the others.
  """
  rules = [skip] if isinstance(skip, str) or callable(skip) else list(skip)
  known: list[str] = [*names, *others]
  skipped: set[str] = set()
  for rule in rules:
    if callable(rule):
      matched = set(rule(names))
    else:
      matched = set(fnmatch.filter(known, rule))
    if not matched or matched - set(known):
      raise ValueError(
        f"skip must match layers of {known}, but {rule!r} matches none"
      )
    skipped |= matched
  return skipped
