"""What sample batches show of every layer: order, cost, sign, statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax import quant
from dr_jax.nn import layers
from dr_jax.nn.inputs import Inputs
from dr_jax.nn.kernels import check_kernels, inside_float_wrappers
from dr_jax.nn.leaves import name_of
from dr_jax.nn.observe import observed

OBSERVED = (*layers.QUANTIZED, nnx.BatchNorm)

# Inputs of a layer that a search for the least error looks at.
_SEARCHED = 2**16


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


class _Seen(NamedTuple):
  """What one trace shows of a module; see Call."""

  macs: int
  source: str | None


class _Statistics(NamedTuple):
  """What batches show of a layer's inputs.

  Attributes:
    finite: whether all are finite.
    low, high: the smallest and the largest.
    params: initial parameters by sign.
  """

  finite: jax.Array
  low: jax.Array
  high: jax.Array
  params: dict[bool, dict[str, jax.Array]]

  def joined(self, other: _Statistics) -> _Statistics:
    """Those of both; the sum of the parameters."""
    return _Statistics(
      self.finite & other.finite,
      jnp.minimum(self.low, other.low),
      jnp.maximum(self.high, other.high),
      jax.tree.map(jnp.add, self.params, other.params),
    )


class _Recorder:
  """The calls of the layers of a network during one trace.

  Attributes:
    inputs: inputs of every call, by layer, in the order of first calls.
    seen: what else the trace shows.
  """

  def __init__(self, modules: dict[str, Any], examples: int):
    self._modules, self._examples = modules, examples
    self._outputs: list[tuple[jax.Array, str]] = []
    self.inputs: dict[str, list[jax.Array]] = {}
    self.seen: dict[str, _Seen] = {}

  def record(self, name: str, x: jax.Array, y: jax.Array) -> None:
    """Records one call of a layer."""
    found = [source for output, source in self._outputs if output is x]
    seen = self.seen.get(name, _Seen(0, found[0] if found else None))
    module = self._modules[name]
    macs = 0
    if type(module) is not nnx.BatchNorm:
      kernel = module.kernel
      macs = y.size // self._examples * kernel.size // kernel.shape[-1]
    self.seen[name] = seen._replace(macs=seen.macs + macs)
    self._outputs.append((y, name))
    self.inputs.setdefault(name, []).append(x)


def calibrate(
  model: nnx.Module,
  activation: quant.ActivationQuantizer | None,
  sample: Any,
  *,
  init: str = "published",
  batches: Iterable[Any] = (),
) -> dict[str, Call]:
  """Runs sample batches through the float network, in one compiled program.

  Args:
    model: the float network.
    activation: input quantizer, or None.
    sample: the first batch; it alone says what is called, and at what cost.
    init: where parameters start; see `quant.fit`.
    batches: further ones.

  Returns:
    What each nnx.Conv, nnx.Linear and nnx.BatchNorm saw, in the order of
    first calls.
  """
  sample = Inputs.of(sample)
  float_inside = inside_float_wrappers(model)
  modules = {
    name_of(path) or type(module).__name__.lower(): module
    for path, module in nnx.iter_modules(model)
    if type(module) in OBSERVED and id(module) not in float_inside
  }
  check_kernels(
    {n: m for n, m in modules.items() if type(m) in layers.QUANTIZED}
  )
  seen, statistics = _observe(
    model, modules, activation, init, [sample, *map(Inputs.of, batches)]
  )
  unseen = [name for name in modules if name not in seen]
  if unseen:
    raise ValueError(
      f"sample must reach every layer, but does not reach {unseen}"
    )
  calls = {}
  for name, (macs, source) in seen.items():
    finite, low, high, by_sign = statistics[name]
    if not finite:
      raise ValueError(
        f"sample must make finite inputs, but that of layer {name!r} is NaN or "
        "infinite"
      )
    signed = bool(low < 0)
    if activation is not None and activation.signed is not None:
      signed = activation.signed
    params = by_sign.get(signed, {})
    if init == "max" and activation is not None and signed in by_sign:
      of_range = activation.with_sign(signed).from_range
      params = params if of_range is None else of_range(low, high)
    calls[name] = Call(modules[name], macs, signed, params, source)
  return calls


def _observe(model, modules, activation, init, batches):
  """Runs a copy whose layers record their calls.

  Returns:
    {name: _Seen} of the layers that the first batch reached, in the order of
    first calls, and {name: _Statistics} over all batches.
  """
  traced: list[dict[str, _Seen]] = []
  tracing: list[_Recorder] = []

  def record(name, x, y):
    tracing[-1].record(name, x, y)

  graph, state = nnx.split(observed(model, modules, record))

  @jax.jit
  def statistics(state, inputs):
    # Whatever is kept after a trace holds no array of it.
    recorder = _Recorder(modules, inputs.examples)
    tracing.append(recorder)
    try:
      nnx.merge(graph, state)(*inputs.args, **inputs.kwargs)
    finally:
      tracing.pop()
    traced.append(recorder.seen)
    return {
      name: _input_statistics(modules[name], xs, activation, init)
      for name, xs in recorder.inputs.items()
    }

  total: dict[str, _Statistics] = {}
  try:
    for batch in batches:
      found = statistics(state, batch)
      total = {
        name: total[name].joined(of) if name in total else of
        for name, of in found.items()
      }
  except jax.errors.UnexpectedTracerError:
    raise ValueError(
      "model must call its layers directly, but calls some inside jit, scan or "
      "vmap"
    ) from None
  count = len(batches)
  if count > 1:
    total = {
      name: of._replace(params=jax.tree.map(lambda p: p / count, of.params))
      for name, of in total.items()
    }
  return traced[0], total


def _input_statistics(module, xs, activation, init):
  # A layer that is called several times has one scale for all its inputs. To
  # touch them finds those that belong to an inner trace, so do it always.
  x = jnp.concatenate([x.reshape(-1).astype(jnp.float32) for x in xs])
  searched = x
  if init == "mse" and x.size > _SEARCHED:
    searched = x[:: -(-x.size // _SEARCHED)]
  params = {}
  if activation is not None and type(module) is not nnx.BatchNorm:
    for signed in (False, True):
      try:
        quantizer = activation.with_sign(signed)
      except ValueError:
        continue  # nn.quantize raises where a layer needs this sign
      params[signed] = quant.fit(quantizer, searched, init)
  # Not (x < 0).any(): behind a ReLU, XLA folds that constant at compile time,
  # element by element.
  low, high = x.min(), x.max()
  return _Statistics(jnp.isfinite(low) & jnp.isfinite(high), low, high, params)
