"""Observes a network on sample batches, layer by layer.

A network that calls its layers directly is one compiled program that returns
their statistics. Where some are called inside a transformation (`nnx.scan`,
`nnx.vmap`, `nnx.remat`, `jax.jit`, ...), arrays of inner traces cannot leave as
outputs: there the program calls back to the host, once for each executed call.
Of a stack of layers every call says which one it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax import quant
from dr_jax.nn.attention import Operand, Product
from dr_jax.nn.bits import Bits
from dr_jax.nn.contraction import base_of, contraction_of
from dr_jax.nn.inputs import Inputs
from dr_jax.nn.observe import observed
from dr_jax.nn.statistics import (
  Statistics,
  of_common_signs,
  searched_params,
  statistics_of,
)


class Seen(NamedTuple):
  """What batches show of a module; see `calibrate.Call`."""

  macs: int
  source: str | None
  statistics: Statistics | None
  stack: tuple[int, ...] = ()


def observe(
  model: nnx.Module,
  modules: dict[str, Any],
  activations: Mapping[str, quant.ActivationQuantizer | None],
  init: str,
  batches: list[Inputs],
) -> dict[str, Seen]:
  """Runs batches through a copy whose layers record their calls.

  Returns:
    What was seen of each module that the first batch reached, in the order of
    first calls.
  """
  for batch in batches:
    batch.examples  # noqa: B018 (raises where there is none)

  if not any(stack_of(module) for module in modules.values()):
    try:
      return _observe_outputs(model, modules, activations, init, batches)
    except jax.errors.UnexpectedTracerError:
      pass
  return _observe_calls(model, modules, activations, init, batches)


def stack_of(module: Any) -> tuple[int, ...]:
  """Leading axes of the parameters of a module that stands for several."""
  if base_of(module) is not None:
    return contraction_of(module).stack(module)
  if isinstance(module, Operand | Product):
    return module.stack
  return tuple(module.mean.shape[:-1])


class _Trace:
  """What one trace shows of the calls of layers."""

  def __init__(self):
    self._outputs: list[tuple[jax.Array, str]] = []
    self.sources: dict[str, str | None] = {}

  def add(self, name: str, x: jax.Array, y: jax.Array) -> None:
    found = [source for output, source in self._outputs if output is x]
    self.sources.setdefault(name, found[0] if found else None)
    self._outputs.append((y, name))


def _macs(module, method, x, y):
  if isinstance(module, Product):
    return module.macs(x, y)
  if base_of(module) is None or _is_lookup(module, method):
    return 0
  return contraction_of(module).macs(module, x, y)


def _is_lookup(module, method):
  known = base_of(module) is not None
  return known and method in contraction_of(module).lookups


def _has_inputs(module, method):
  """Whether a call has an input to quantize; operands have a product's."""
  return not (_is_lookup(module, method) or isinstance(module, Product))


def _observe_outputs(model, modules, activations, init, batches):
  """As outputs of one program."""
  traced: list[tuple[dict[str, str | None], dict[str, int]]] = []
  tracing: list[Callable[..., None]] = []

  def record(*call):
    tracing[-1](*call)

  graph, state = nnx.split(observed(model, modules, record))

  @jax.jit
  def statistics(state, inputs):
    # Whatever is kept after a trace holds no array of it.
    trace, macs = _Trace(), dict.fromkeys(modules, 0)
    calls: dict[str, list[jax.Array]] = {}

    def add(name, module, method, x, y):
      trace.add(name, x, y)
      macs[name] += _macs(module, method, x, y)
      if _has_inputs(module, method):
        calls.setdefault(name, []).append(x)

    tracing.append(add)
    try:
      nnx.merge(graph, state)(*inputs.args, **inputs.kwargs)
    finally:
      tracing.pop()
    traced.append((trace.sources, macs))
    return {
      name: statistics_of(xs, activations.get(name), init)
      for name, xs in calls.items()
    }

  found = [
    {
      name: searched_params(of, activations.get(name))
      for name, of in statistics(state, batch).items()
    }
    for batch in batches
  ]
  sources, macs = traced[0]
  return {
    name: Seen(
      macs[name] // batches[0].examples,
      source,
      _joined([of[name] for of in found if name in of]),
    )
    for name, source in sources.items()
  }


def _joined(found: list[Statistics]) -> Statistics | None:
  if not found:
    return None
  return functools.reduce(Statistics.joined, found).mean_of(len(found))


class _Calls:
  """What the calls of one batch say of a layer.

  Attributes:
    macs: of all calls.
    inputs: of every call, flat, by position in a stack; none of a lookup.
  """

  def __init__(self):
    self.macs = 0
    self.inputs: dict[int, list[np.ndarray]] = {}


class _Host:
  """Receives the calls of a running program."""

  def __init__(self):
    self._calls: dict[str, _Calls] = {}

  def add(self, name: str, macs: int, place: Any, *x: Any) -> None:
    calls = self._calls.setdefault(name, _Calls())
    calls.macs += macs
    inputs = calls.inputs.setdefault(int(place), [])
    inputs.extend(np.asarray(each).reshape(-1) for each in x)

  def taken(self) -> dict[str, _Calls]:
    """The calls since the last time, by layer."""
    jax.effects_barrier()
    calls, self._calls = self._calls, {}
    return calls


def _observe_calls(model, modules, activations, init, batches):
  """By calls to the host, which sees what the program itself would see."""
  stacks = {name: stack_of(module) for name, module in modules.items()}
  trace, host = _Trace(), _Host()
  own_bits: dict[str, bool] = {}

  def record(name, module, method, x, y):
    trace.add(name, x, y)
    if stacks[name]:
      own_bits[name] = not module.bits.get_value().ndim
    place = module.place.get_value() if stacks[name] else 0
    macs = _macs(module, method, x, y)
    seen = (x,) if _has_inputs(module, method) else ()
    jax.debug.callback(functools.partial(host.add, name, macs), place, *seen)

  def of_inputs(name, xs):
    activation = activations.get(name)
    return searched_params(statistics_of(xs, activation, init), activation)

  extra = {name: _numbered(stack) for name, stack in stacks.items() if stack}
  graph, state = nnx.split(observed(model, modules, record, extra=extra))

  @jax.jit
  def run(state, inputs):
    nnx.merge(graph, state)(*inputs.args, **inputs.kwargs)

  macs: list[dict[str, int]] = []
  found: dict[str, list[Statistics | None]] = {}
  for batch in batches:
    run(state, batch)
    taken = host.taken()
    macs.append({name: calls.macs for name, calls in taken.items()})
    for name, calls in taken.items():
      each = [
        of_inputs(name, [np.concatenate(xs)]) if xs else None
        for _, xs in sorted(calls.inputs.items())
      ]
      found.setdefault(name, []).append(_of_stack(each, stacks[name]))
  return {
    name: Seen(
      macs[0][name] // batches[0].examples // math.prod(stacks[name]),
      source,
      _joined([of for of in found[name] if of is not None]),
      stacks[name] if own_bits.get(name) else (),
    )
    for name, source in trace.sources.items()
    if name in macs[0]
  }


def _numbered(stack):
  """Variables that number the layers of a stack.

  `place` is sliced as parameters are; `bits` shows whether bits are.
  """
  numbers = jnp.arange(math.prod(stack), dtype=jnp.int32).reshape(stack)
  return {"place": nnx.Param(numbers), "bits": Bits(numbers)}


def _of_stack(each, stack):
  """Statistics of the layers of a stack, with its axes."""
  if not stack or each[0] is None:
    return each[0]
  params = of_common_signs([of.params for of in each])
  each = [of._replace(params=p) for of, p in zip(each, params, strict=True)]
  return jax.tree.map(
    lambda *xs: np.stack(xs).reshape(*stack, *np.shape(xs[0])), *each
  )
