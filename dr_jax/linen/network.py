"""A Linen network as an NNX module whose layers are NNX layers.

The Linen module still runs: its own code calls its layers, inside its own
transformations. A call of a layer that `TWINS` knows is intercepted
(`flax.linen.intercept_methods`), and the NNX layer that stands for it is called
on the variables that the layer sees there. Whatever `nn.quantize` puts in the
place of that layer is therefore called in its place too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from flax import linen, nnx

from dr_jax.linen.programs import MARKS, marked, programs_of
from dr_jax.nn import Bits
from dr_jax.nn.contraction import base_of, contraction_of
from dr_jax.nn.leaves import filled, item_at, nested, value_of, with_value

Variables = dict[str, Any]
Path = tuple[Any, ...]

# Collections that a call never changes.
FIXED = ("params", "bits", "constants")


class Scope(nnx.Module):
  """What a Linen module holds: variables, and the scopes inside it."""


class Network(Scope):
  """A Linen module and its variables; `from_linen` makes one."""

  def __init__(self, module: linen.Module, rngs: nnx.Rngs | None, jitted: bool):
    self._module = _Module(module)
    self._rngs = rngs
    self._jitted = jitted

  # So that dr_jax sees an argument `train`.
  @property
  def __signature__(self) -> Any:  # pyrefly: ignore[bad-override]
    return inspect.signature(self._module.module.__call__)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    apply, variables = split(self)
    streams = {} if self._rngs is None else dict(self._rngs.items())
    outputs, updates = apply(
      variables,
      *args,
      rngs={name: stream() for name, stream in streams.items()},
      mutable=[name for name in variables if name not in FIXED],
      **kwargs,
    )
    update(self, updates)
    return outputs


class _Module:
  """Holds a Linen module, whose fields need not be hashable."""

  def __init__(self, module: linen.Module):
    self.module = module


class _Layer(NamedTuple):
  """A layer without its arrays: its graph, and paths and kinds of variables."""

  graph: nnx.GraphDef
  leaves: list[tuple[Path, Any]]
  methods: tuple[str, ...]

  @classmethod
  def of(cls, layer: nnx.Module) -> _Layer:
    graph, state = nnx.split(layer)
    flat = nnx.to_flat_state(state)
    known = base_of(layer) is not None
    return cls(
      graph,
      [(path, with_value(leaf, None)) for path, leaf in flat],
      contraction_of(layer).methods if known else ("__call__",),
    )


def split(network: nnx.Module) -> tuple[Callable[..., Any], Variables]:
  """Splits a network into a function like Linen's `apply` and its variables.

  Args:
    network: what `quantize` or `from_linen` returned; it is not changed.

  Returns:
    `apply(variables, *args, mutable=False, rngs=None, **kwargs)`, as
    `module.apply`; and the variables by collection: "params" as Linen has them,
    with the parameters of quantizers beside the kernels, and "bits", the
    bit-widths in use, which `nn.set_bits` sets in the network. One compilation
    serves all bits.

  Raises:
    ValueError: if it is another network; `apply` raises one if an array is
      missing.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from dr_jax import linen, nn, quant
  >>> import flax.linen
  >>> layers = flax.linen.Dense(6), flax.linen.Dense(2)
  >>> x, module = jnp.ones((1, 4)), flax.linen.Sequential(layers)
  >>> network = linen.quantize(
  ...   module,
  ...   module.init(jax.random.key(0), x),
  ...   weight=quant.double_rounding((8, 4)),
  ...   sample=x,
  ...   skip=(),
  ... )
  >>> apply, variables = linen.split(network)
  >>> jax.jit(apply)(variables, x).shape, list(variables["params"]["layers_0"])
  ((1, 2), ['bias', 'kernel', 'weight_params'])
  """
  held = _checked(network)
  module = held._module.module
  layers = {path: _Layer.of(layer) for path, layer in _layers(network)}
  graphs = hash(tuple((path, layer.graph) for path, layer in layers.items()))

  def apply(variables, *args, mutable=False, **kwargs):
    intercept = functools.partial(_call_layer, layers, variables)
    programs = programs_of(graphs, variables.get("bits"), held._jitted)
    with programs, linen.intercept_methods(intercept):
      outputs = module.apply(
        marked(variables), *args, mutable=mutable, **kwargs
      )
    if mutable is False:
      return outputs
    outputs, updates = outputs
    return outputs, {k: v for k, v in updates.items() if k != MARKS}

  return apply, _variables(network)


def update(network: nnx.Module, variables: Mapping[str, Any]) -> None:
  """Writes variables back into a network, in place.

  Args:
    network: the one that was split, or an equal one.
    variables: all collections or some, by name.

  Raises:
    ValueError: if an array is missing, left over or has another shape; nothing
      is changed then.
  """
  _checked(network)
  leaves: dict[str, Any] = {name: [] for name in variables}
  for path, leaf in _leaves(network):
    leaves.get(_collection(leaf), []).append((path, leaf))
  writes = [
    write
    for name, tree in variables.items()
    for write in filled(leaves[name], tree, f"{name}/")
  ]
  nnx.update(network, nnx.from_flat_state(writes))


def _call_layer(layers, variables, call, args, kwargs, context):
  """Intercepts a call: an NNX layer's, on the variables of a Linen layer."""
  module, method = context.module, context.method_name
  layer = None if module.scope is None else layers.get(module.path)
  if layer is not None and method == "setup":
    return None  # It would look for a float kernel.
  if layer is None or method not in layer.methods:
    return call(*args, **kwargs)
  before = [
    (path, with_value(leaf, _seen(module, variables, path, leaf)))
    for path, leaf in layer.leaves
  ]
  state = nnx.from_flat_state(before)
  called = nnx.merge(layer.graph, state, copy=True)
  if getattr(module, "use_running_average", None) is not None:
    kwargs = {**kwargs, "use_running_average": module.use_running_average}
  outputs = getattr(called, method)(*args, **kwargs)
  after = dict(nnx.to_flat_state(nnx.state(called)))
  for path, leaf in before:
    name, value = path[0], value_of(after[path])
    collection = _collection(leaf)
    if value is not value_of(leaf) and module.is_mutable_collection(collection):
      module.put_variable(collection, name, value)
  return outputs


def _seen(module, variables, path, leaf):
  """A variable as a layer sees it.

  A transformation may pass a part of it, or not pass its collection: then the
  whole one serves, from outside.
  """
  collection, (name, *rest) = _collection(leaf), path
  if module.has_variable(collection, name):
    return item_at(module.get_variable(collection, name), rest)
  try:
    return item_at(variables[collection], (*module.path, *path))
  except (KeyError, TypeError):
    name = "/".join((collection, *module.path, *path))
    raise ValueError(
      f"{name} must be an array, but is missing: pass what split returned"
    ) from None


def _checked(network) -> Network:
  if not isinstance(network, Network):
    raise ValueError(
      "network must be what linen.quantize or linen.from_linen returned, got "
      f"{type(network).__name__}"
    )
  return network


def _layers(network) -> Iterator[tuple[Path, nnx.Module]]:
  """Paths and layers: the modules in scopes that are none themselves."""
  for name, node in vars(network).items():
    if isinstance(node, Scope):
      for path, layer in _layers(node):
        yield (name, *path), layer
    elif isinstance(node, nnx.Module):
      yield (name,), node


def _variables(network) -> Variables:
  leaves = _leaves(network)
  return nested(((_collection(v), *path), value_of(v)) for path, v in leaves)


def _leaves(network) -> list[tuple[Path, Any]]:
  """Paths and variables, without the streams of random numbers."""
  flat = nnx.to_flat_state(nnx.state(network))
  return [
    (path, leaf) for path, leaf in flat if not isinstance(leaf, nnx.RngState)
  ]


def _collection(leaf):
  if isinstance(leaf, Bits):
    return "bits"
  if isinstance(leaf, nnx.Param):
    return "params"
  if isinstance(leaf, nnx.Variable):
    return nnx.variable_name_from_type(type(leaf))
  return "constants"
