"""What one batch shows of every layer: order, cost, sign, statistics."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax.nn import layers
from dr_jax.nn.layers import copy_attributes
from dr_jax.nn.substitute import substitute
from dr_jax.quant import ActivationQuantizer

OBSERVED = (*layers.QUANTIZED, nnx.BatchNorm)


class Call(NamedTuple):
  """What calibration saw of one module.

  Attributes:
    module: the float module.
    macs: multiply-accumulates for one example, over all its calls.
    signed: sign of the input codes.
    params: initial parameters of the input quantizer at that sign.
    source: name of the layer whose output it was first called on, if any.
  """

  module: Any
  macs: int
  signed: bool
  params: dict[str, jax.Array]
  source: str | None


class _Recorder:
  """What one trace of a network shows of its layers.

  Attributes:
    inputs: inputs of every call, by layer, in the order of first calls.
    macs: multiply-accumulates for one example, over all calls.
    sources: the layer whose output a layer was first called on, if any.
  """

  def __init__(self, modules: dict[str, Any], examples: int):
    self._modules, self._examples = modules, examples
    self._outputs: list[tuple[jax.Array, str]] = []
    self.inputs: dict[str, list[jax.Array]] = {}
    self.macs = dict.fromkeys(modules, 0)
    self.sources: dict[str, str | None] = {}

  def record(self, name: str, x: jax.Array, y: jax.Array) -> None:
    """Records one call of a layer."""
    found = [source for output, source in self._outputs if output is x]
    self.sources.setdefault(name, found[0] if found else None)
    self._outputs.append((y, name))
    self.inputs.setdefault(name, []).append(x)
    module = self._modules[name]
    if type(module) is not nnx.BatchNorm:
      kernel = module.kernel
      per_example = y.size // self._examples
      self.macs[name] += per_example * kernel.size // kernel.shape[-1]


def calibrate(
  model: nnx.Module, activation: ActivationQuantizer | None, sample: Any
) -> dict[str, Call]:
  """Runs the sample through the float network, in one compiled program.

  Returns:
    What each nnx.Conv, nnx.Linear and nnx.BatchNorm saw, in the order of
    first calls.
  """
  arguments = sample if isinstance(sample, tuple) else (sample,)
  examples = _count_examples(sample, jax.tree.leaves(arguments))
  modules = {
    "/".join(map(str, path)) or type(module).__name__.lower(): module
    for path, module in nnx.iter_modules(model)
    if type(module) in OBSERVED
  }
  layers.check_kernels(
    {n: m for n, m in modules.items() if type(m) in layers.QUANTIZED}
  )
  recorder, seen = _trace(model, modules, activation, arguments, examples)
  unseen = [name for name in modules if name not in recorder.inputs]
  if unseen:
    raise ValueError(
      f"sample must reach every layer, but does not reach {unseen}"
    )
  calls = {}
  for name in recorder.inputs:
    finite, negative, params = seen[name]
    if not finite:
      raise ValueError(
        f"sample must make finite inputs, but that of layer {name!r} is NaN or "
        "infinite"
      )
    signed = bool(negative)
    if activation is not None and activation.signed is not None:
      signed = activation.signed
    calls[name] = Call(
      modules[name],
      recorder.macs[name],
      signed,
      params.get(signed, {}),
      recorder.sources[name],
    )
  return calls


def _count_examples(sample, leaves):
  arrays = [leaf for leaf in leaves if _is_array(leaf) and leaf.ndim]
  if not arrays:
    raise ValueError(f"sample must be arrays [batch, ...], got {sample!r}")
  # Of several arrays the one with most axes is the batch: a table has fewer.
  examples = len(max(arrays, key=lambda array: array.ndim))
  if not examples:
    raise ValueError("sample must be arrays [batch, ...], got no example")
  return examples


def _trace(model, modules, activation, arguments, examples):
  """Runs a copy whose layers record their calls.

  Returns:
    The recorder, and `_input_statistics` of every layer that was called.
  """
  traces: list[_Recorder] = []

  def record(name, x, y):
    traces[-1].record(name, x, y)

  copy = nnx.clone(model)
  observed = [m for _, m in nnx.iter_modules(copy) if type(m) in OBSERVED]
  copy = substitute(
    copy,
    {
      id(module): _observer(module, functools.partial(record, name))
      for name, module in zip(modules, observed, strict=True)
    },
  )
  copy.eval()
  graph, state = nnx.split(copy)
  leaves, structure = jax.tree.flatten(arguments)

  @jax.jit
  def statistics(state, arrays):
    # Every trace starts afresh; the last one is that of the program.
    recorder = _Recorder(modules, examples)
    traces.append(recorder)
    rest = iter(arrays)
    filled = [next(rest) if _is_array(leaf) else leaf for leaf in leaves]
    nnx.merge(graph, state)(*jax.tree.unflatten(structure, filled))
    return {
      name: _input_statistics(modules[name], xs, activation)
      for name, xs in recorder.inputs.items()
    }

  try:
    seen = statistics(state, [leaf for leaf in leaves if _is_array(leaf)])
  except jax.errors.UnexpectedTracerError:
    raise ValueError(
      "model must call its layers directly, but calls some inside jit, scan or "
      "vmap"
    ) from None
  return traces[-1], seen


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


def _is_array(x):
  return isinstance(x, jax.Array | np.ndarray)


def _observer(module, record):
  """The module, calling `record(input, output)` on each call."""
  kind = type(module)
  signature = inspect.signature(kind.__call__)

  class Observer(kind):
    def __init__(self):
      copy_attributes(self, module)

    def __call__(self, *args, **kwargs):
      y = kind.__call__(self, *args, **kwargs)
      # The input is the first parameter, under whatever name.
      record(signature.bind(self, *args, **kwargs).args[1], y)
      return y

  return Observer()
