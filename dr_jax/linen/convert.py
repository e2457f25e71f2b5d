"""From a Linen module and its variables to an NNX module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core import unfreeze
from flax.errors import FlaxError

from dr_jax import nn
from dr_jax.linen.layers import twin_of
from dr_jax.linen.network import Network, Path, Scope
from dr_jax.linen.programs import marked, own_programs

# Modules that compute with other kernels than the variables of their layers.
_WRAPPERS = (linen.WeightNorm, linen.SpectralNorm)


def from_linen(
  module: linen.Module,
  variables: Mapping[str, Any],
  *args: Any,
  rngs: nnx.Rngs | None = None,
  **kwargs: Any,
) -> nnx.Module:
  """Returns an NNX module that computes as a Linen module does.

  Its layers are NNX layers by the paths that they have in the variables, for
  everything of dr_jax that takes an NNX module.

  Args:
    module: the Linen module.
    variables: of `module.init`, or trained.
    args, kwargs: of a call that reaches all its layers.
    rngs: streams for its calls, such as `nnx.Rngs(dropout=0)`.

  Raises:
    ValueError: if the module is not a Linen module or is a single layer; if the
      variables are not arrays by collection, or do not fit the module and the
      call; if the call does not reach a module with parameters, or a name in
      the variables is that of a method of nnx.Module.
  """
  variables = _checked(module, variables)
  try:
    types, twins, jitted = _trace(module, variables, rngs, args, kwargs)
  except FlaxError as error:
    raise ValueError(
      f"variables and sample must be what module.apply takes: {error}"
    ) from error
  _check_reached(variables["params"], types)
  network = Network(module, rngs, jitted)
  for collection, tree in variables.items():
    for path, value in _flat(tree):
      *inside, name = path
      layer = twins.get(tuple(inside))
      if layer is None:
        kind = nnx.variable_type_from_name(collection, allow_register=True)
        node = _scope(network, inside, types)
        _set(node, path, name, kind(jnp.asarray(value)))
      else:
        getattr(layer, name).set_value(jnp.asarray(value))
  for path, layer in twins.items():
    _set(_scope(network, path[:-1], types), path, path[-1], layer)
  return network


def quantize(
  module: linen.Module,
  variables: Mapping[str, Any],
  *,
  sample: Any,
  rngs: nnx.Rngs | None = None,
  **options: Any,
) -> Any:
  """Returns a multi-precision network of a Linen module: see `nn.quantize`.

  Args:
    module: the float network.
    variables: its variables.
    sample: one calibration batch, as `nn.quantize` takes it; of a module with
      an argument `train`, `nn.Inputs(x, train=False)`.
    rngs: streams for its calls, such as `nnx.Rngs(dropout=0)`.
    options: of `nn.quantize`.

  Returns:
    An nnx.Module, for everything that takes what `nn.quantize` returns; `split`
    has the Linen view.

  Raises:
    ValueError: as `from_linen` and `nn.quantize`.
  """
  inputs = nn.Inputs.of(sample)
  network = from_linen(
    module, variables, *inputs.args, rngs=rngs, **inputs.kwargs
  )
  return nn.quantize(network, sample=inputs, **options)


def _checked(module, variables):
  """Variables as a dict of arrays, if they can be those of a float module."""
  if not isinstance(module, linen.Module):
    kind = module if isinstance(module, type) else type(module)
    raise ValueError(
      "module must be an instance of flax.linen.Module, got "
      f"{'the class ' if kind is module else ''}{kind.__name__}"
    )
  if not isinstance(variables, Mapping) or "params" not in variables:
    got = (sorted if isinstance(variables, Mapping) else _name)(variables)
    raise ValueError(
      f"variables must be collections by name, with 'params', got {got}"
    )
  if "bits" in variables:
    raise ValueError(
      "variables must be those of a float module, got a collection 'bits'"
    )
  variables = unfreeze(linen.meta.unbox(variables))
  for path, value in _flat(variables):
    if not isinstance(value, jax.Array | np.ndarray):
      raise ValueError(
        f"{'/'.join(path)} must be an array, got {type(value).__name__} (leave "
        "out what sow collects)"
      )
  return variables


def _name(value):
  return type(value).__name__


def _trace(module, variables, rngs, args, kwargs):
  """Calls a module on shapes.

  Returns:
    Types of its modules by path, twins of its layers, and whether its own jit
    keeps programs: then the second call does not meet all layers again.
  """
  types: dict[Path, type] = {}
  twins: dict[Path, Any] = {}
  met: set[Path] = set()
  wrappers: list[linen.Module] = []

  def intercept(call, args, kwargs, context):
    layer, name = context.module, context.method_name
    if layer.scope is not None:
      met.add(layer.path)
      types.setdefault(layer.path, type(layer))
      twin = None if wrappers else twin_of(layer)
      if twin is not None and name in twin.methods:
        made = nnx.eval_shape(lambda: twin.make(layer, args[0], nnx.Rngs(0)))
        if _fits(made, layer.path, variables):
          twins.setdefault(layer.path, nnx.split(made))
    wraps = isinstance(layer, _WRAPPERS)
    wrappers.extend([layer] * wraps)
    try:
      return call(*args, **kwargs)
    finally:
      if wraps:
        wrappers.pop()

  def run(variables):
    streams = {} if rngs is None else {n: jax.random.key(0) for n in rngs}
    with linen.intercept_methods(intercept):
      return module.apply(
        marked(variables),
        *args,
        rngs=streams,
        mutable=[name for name in variables if name != "params"],
        **kwargs,
      )

  with own_programs():
    jax.eval_shape(lambda variables: run(variables), variables)
    first = met.copy()
    met.clear()
    jax.eval_shape(lambda variables: run(variables), variables)
  if () in twins:
    raise ValueError(
      f"module must contain its layers, got a {type(module).__name__}"
    )
  made = {path: nnx.merge(*parts, copy=True) for path, parts in twins.items()}
  return types, made, met != first


def _check_reached(params, types):
  unseen = {path[:-1] for path, _ in _flat(params)} - set(types)
  if unseen:
    names = sorted("/".join(path) for path in unseen)
    raise ValueError(
      f"sample must reach every layer, but does not reach {names}"
    )


def _fits(layer, path, variables):
  """Whether a twin can have the variables of a layer, or of a stack of it."""
  found = [
    (name, value.shape)
    for tree in variables.values()
    for name, value in _inside(tree, path).items()
  ]
  return all(
    shape[len(shape) - getattr(layer, name).ndim :]
    == getattr(layer, name).shape
    for name, shape in found
  )


def _inside(tree, path):
  for key in path:
    tree = tree.get(key, {})
  return tree


def _flat(tree, path=()):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, (*path, key))
    else:
      yield (*path, key), value


def _scope(network, path, types):
  """The scope at a path, made where there is none."""
  node = network
  for depth, name in enumerate(path, start=1):
    if name not in vars(node):
      kind = types.get(tuple(path[:depth]), Scope)
      _set(node, path, name, _scope_class(kind)())
    node = getattr(node, name)
  return node


def _scope_class(kind):
  """A scope that reports show by the name of its Linen class."""
  return type(kind.__name__, (Scope,), {})


def _set(node, path, name, value):
  if hasattr(node, name):
    raise ValueError(
      f"name {'/'.join(path)!r} of a variable must not be one of nnx.Module"
    )
  setattr(node, name, value)
