"""Turns any Flax NNX network into a multi-precision one.

One calibration batch goes through the float network; what each layer saw
(sign, statistics, order, cost) decides how it is quantized. The converted
network has the same attributes, parameter names and call signature.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax.nn import layers
from dr_jax.nn import norm as norms
from dr_jax.nn.bits import quantized_layers
from dr_jax.nn.layers import adopt
from dr_jax.quant import ActivationQuantizer, WeightQuantizer

_OBSERVED = (*layers.QUANTIZED, nnx.BatchNorm)

Skip = str | Callable[[Sequence[str]], Iterable[str]]


def first_and_last(names: Sequence[str]) -> tuple[str, ...]:
  """Skip rule: the first and the last layer in call order stay float."""
  return (names[0], names[-1])


def quantize(
  model: nnx.Module,
  *,
  weight: WeightQuantizer,
  activation: ActivationQuantizer | None = None,
  sample: Any,
  norm: str = "switchable",
  skip: Skip | Iterable[Skip] = first_and_last,
) -> nnx.Module:
  """Returns a multi-precision copy of a Flax NNX network.

  Every nnx.Conv (grouped, depthwise, dilated, strided), nnx.Linear and
  nnx.BatchNorm is replaced, wherever it is stored; the model itself is left
  unchanged. Other layers with a kernel, and subclasses of these three, stay
  float, and a warning names them. A norm follows the bits of the layer whose
  output it normalizes, else of the last one called before it. Starts at the
  highest bit-width; see `nn.set_bits`.

  Args:
    model: the float network, preferably trained.
    weight: weight quantizer, e.g. `quant.double_rounding((8, 6, 4, 2))`.
    activation: input quantizer with the same bits, or None for float inputs.
      A sign left open is settled per layer: signed where an input was
      negative.
    sample: one calibration batch, an array [batch, ...], or a tuple of all
      positional arguments of the model's `__call__`.
    norm: how many sets of parameters and statistics a batch norm has.
      "switchable": one per bit-width of the layer it follows (arXiv
      1812.08928). "transitional": one per bit-width of the quantized layer
      called before that one and its own, for layers of different bit-widths
      (Bit-Mixer, ICCV 2021; arXiv 2502.01199, section 3.3); one per own
      bit-width if it follows the first. Call order alone decides which layer
      is the one before, also at residual joins and shortcuts. "shared": one
      set for all. `nn.requantize` turns the first kind into the second.
    skip: layers that stay float: names, glob patterns ("head/*"), functions
      from the layer names in call order to names, or a sequence of these.

  Raises:
    ValueError: if bit-widths differ or `norm` is unknown; if the model is
      quantized already or nothing is left to quantize; if a skip matches no
      layer; if weights or inputs are NaN or infinite; if the sample does not
      reach a layer, or reaches it inside a jax transformation; if a layer has
      inputs of a sign that the activation cannot quantize.
  """
  if activation is not None and activation.bits != weight.bits:
    raise ValueError(
      f"activation.bits must be the bits of weight, {weight.bits}, got "
      f"{activation.bits}"
    )
  if norm not in norms.KINDS:
    raise ValueError(f"norm must be one of {norms.KINDS}, got {norm!r}")
  if quantized_layers(model):
    raise ValueError("model must be a float network, but is quantized already")
  model = nnx.clone(model)
  calls = _calibrate(model, activation, sample)
  names = [
    n for n, call in calls.items() if type(call.module) in layers.QUANTIZED
  ]
  skipped = _skipped(skip, names) if names else set()
  quantized = [name for name in names if name not in skipped]
  if not quantized:
    raise ValueError(
      f"skip must leave a layer to quantize; the model's nnx.Conv and "
      f"nnx.Linear layers are {names}"
    )
  _warn_of_float_layers(model)
  params = layers.initial_params(
    weight, {name: calls[name].module for name in quantized}
  )
  replacements, order = {}, 0
  for name, call in calls.items():
    if name in quantized:
      order = quantized.index(name)
      place = layers.Place(name, order, call.macs)
      new = layers.QUANTIZED[type(call.module)](
        call.module,
        place,
        weight,
        _settled(activation, call.signed, name),
        input_params=call.params,
        weight_arrays=params[name],
      )
    elif type(call.module) is nnx.BatchNorm:
      source = call.source
      follows = quantized.index(source) if source in quantized else order
      new = norms.BatchNorm(
        call.module, kind=norm, candidates=len(weight.bits), order=follows
      )
    else:
      continue
    replacements[id(call.module)] = new
  return substitute(model, replacements)


class _Call(NamedTuple):
  """What calibration saw of one module.

  Attributes:
    module: the float module.
    macs: multiply-accumulates for one example, over all its calls.
    signed: sign of the input codes.
    params: initial parameters of the input quantizer at that sign.
    source: name of the layer whose output it was first called on, if any.
  """

  module: nnx.Module
  macs: int
  signed: bool
  params: dict[str, jax.Array]
  source: str | None


def _calibrate(model, activation, sample) -> dict[str, _Call]:
  """Runs the sample through the float network, in one compiled program.

  Returns:
    What each nnx.Conv, nnx.Linear and nnx.BatchNorm saw, in the order of
    first calls.
  """
  arguments = sample if isinstance(sample, tuple) else (sample,)
  leaves, structure = jax.tree.flatten(arguments)
  arrays = [leaf for leaf in leaves if _is_array(leaf) and leaf.ndim]
  if not arrays:
    raise ValueError(f"sample must be arrays [batch, ...], got {sample!r}")
  # Of several arrays the one with most axes is the batch: a table has fewer.
  examples = len(max(arrays, key=lambda array: array.ndim))
  if not examples:
    raise ValueError("sample must be arrays [batch, ...], got no example")
  modules = {
    "/".join(map(str, path)) or type(module).__name__.lower(): module
    for path, module in nnx.iter_modules(model)
    if type(module) in _OBSERVED
  }
  layers.check_kernels(
    {n: m for n, m in modules.items() if type(m) in layers.QUANTIZED}
  )
  inputs: dict[str, list[jax.Array]] = {}
  macs = dict.fromkeys(modules, 0)
  sources: dict[str, str | None] = {}
  outputs: list[tuple[jax.Array, str]] = []

  def record(name, x, y):
    found = [source for output, source in outputs if output is x]
    sources.setdefault(name, found[0] if found else None)
    outputs.append((y, name))
    inputs.setdefault(name, []).append(x)
    module = modules[name]
    if type(module) is not nnx.BatchNorm:
      kernel = module.kernel
      macs[name] += y.size // examples * kernel.size // kernel.shape[-1]

  copy = nnx.clone(model)
  observers = {
    id(module): _observer(module, functools.partial(record, name))
    for name, module in zip(
      modules,
      (m for _, m in nnx.iter_modules(copy) if type(m) in _OBSERVED),
      strict=True,
    )
  }
  copy = substitute(copy, observers)
  copy.eval()
  graph, state = nnx.split(copy)

  @jax.jit
  def statistics(state, arrays):
    inputs.clear()
    outputs.clear()
    rest = iter(arrays)
    filled = [next(rest) if _is_array(leaf) else leaf for leaf in leaves]
    nnx.merge(graph, state)(*jax.tree.unflatten(structure, filled))
    return {
      name: _input_statistics(modules[name], xs, activation)
      for name, xs in inputs.items()
    }

  try:
    seen = statistics(state, [leaf for leaf in leaves if _is_array(leaf)])
  except jax.errors.UnexpectedTracerError:
    raise ValueError(
      "model must call its layers directly, but calls some inside jit, scan or "
      "vmap"
    ) from None
  unseen = [name for name in modules if name not in inputs]
  if unseen:
    raise ValueError(
      f"sample must reach every layer, but does not reach {unseen}"
    )
  calls = {}
  for name in inputs:
    finite, negative, params = seen[name]
    if not finite:
      raise ValueError(
        f"sample must make finite inputs, but that of layer {name!r} is NaN or "
        "infinite"
      )
    signed = bool(negative)
    if activation is not None and activation.signed is not None:
      signed = activation.signed
    calls[name] = _Call(
      modules[name], macs[name], signed, params.get(signed, {}), sources[name]
    )
  return calls


def _input_statistics(module, xs, activation):
  """Whether inputs are finite and negative, and parameters by sign."""
  # A layer that is called several times has one scale for all its inputs. To
  # touch them finds those that belong to an inner trace, so do it always.
  x = jnp.concatenate([x.reshape(-1).astype(jnp.float32) for x in xs])
  params = {}
  if activation is not None and type(module) is not nnx.BatchNorm:
    for signed in (False, True):
      try:
        quantizer = activation.with_sign(signed)
      except ValueError:
        continue  # an error only where a layer needs this sign: see _settled
      params[signed] = quantizer.init(x)
  # Not (x < 0).any(): behind a ReLU, XLA folds that constant at compile time,
  # element by element.
  low, high = x.min(), x.max()
  return jnp.isfinite(low) & jnp.isfinite(high), low < 0, params


def _settled(activation, signed, name):
  """The activation at the sign that a layer needs."""
  if activation is None:
    return None
  try:
    return activation.with_sign(signed)
  except ValueError as error:
    raise ValueError(f"input of layer {name!r}: {error}") from error


def _is_array(x):
  return isinstance(x, jax.Array | np.ndarray)


def _observer(module, record):
  """The module, calling `record(input, output)` on each call."""
  kind = type(module)
  signature = inspect.signature(kind.__call__)

  class Observer(kind):
    def __init__(self):
      adopt(self, module)

    def __call__(self, *args, **kwargs):
      y = kind.__call__(self, *args, **kwargs)
      # The input is the first parameter, under whatever name.
      record(signature.bind(self, *args, **kwargs).args[1], y)
      return y

  return Observer()


def _warn_of_float_layers(model):
  """Names layers with a kernel that `quantize` does not know."""
  left = [
    f"{'/'.join(map(str, path))} ({type(module).__name__})"
    for path, module in nnx.iter_modules(model)
    if type(module) not in _OBSERVED
    and (
      isinstance(getattr(module, "kernel", None), nnx.Param)
      or isinstance(module, _OBSERVED)
    )
  ]
  if left:
    warnings.warn(
      f"these layers stay as they are: {', '.join(left)}; quantize replaces "
      "nnx.Conv, nnx.Linear and nnx.BatchNorm, and not their subclasses",
      stacklevel=3,
    )


def _skipped(skip, names) -> set[str]:
  """Resolves skip rules to layer names; a rule that matches nothing raises."""
  rules = [skip] if isinstance(skip, str) or callable(skip) else list(skip)
  skipped: set[str] = set()
  for rule in rules:
    if callable(rule):
      matched = set(rule(names))
    else:
      matched = set(fnmatch.filter(names, rule))
    if not matched or matched - set(names):
      raise ValueError(
        f"skip must match layers of {names}, but {rule!r} matches none"
      )
    skipped |= matched
  return skipped


def substitute(model, replacements):
  """Swaps modules by identity, wherever they are stored; returns the root."""

  def swap(value):
    if id(value) in replacements:
      return replacements[id(value)]
    if type(value) is dict:
      items = {key: swap(item) for key, item in value.items()}
      same = all(items[key] is value[key] for key in value)
      return value if same else items
    if type(value) is list or isinstance(value, tuple):
      items = [swap(item) for item in value]
      same = all(a is b for a, b in zip(items, value, strict=True))
      if same:
        return value
      make = getattr(type(value), "_make", type(value))
      return make(items)
    return value

  for _, node in list(nnx.iter_graph(model)):
    if not isinstance(node, nnx.Pytree):
      continue
    for name, value in list(vars(node).items()):
      swapped = value if name.startswith("_pytree") else swap(value)
      if swapped is not value:
        setattr(node, name, nnx.data(swapped))
  return swap(model)
