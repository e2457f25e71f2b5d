"""A deployed network as a graph of array operations, traced once.

`trace` runs the network through `jax.make_jaxpr` with a symbolic batch size.
What quantizes a layer's input and what decodes its weight stay one node each,
"quantize" and "weight"; all else becomes the primitives of JAX, without nested
functions. Whatever depends on constants alone is computed, so that a row of a
norm, say, is one constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from dr_jax import nn
from dr_jax.quant import ActivationQuantizer, WeightQuantizer
from dr_jax.runtime import command

# Primitives that only call the jaxpr in this parameter.
_CALLS = {
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "remat2": "jaxpr",
  "checkpoint": "jaxpr",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
  """What a node computes: compared by identity.

  Attributes:
    shape: sizes; one that is not an int is a multiple of the batch size.
    dtype: of its elements.
  """

  shape: tuple[Any, ...]
  dtype: np.dtype


Operand = Value | np.ndarray


class Node(NamedTuple):
  """One operation.

  Attributes:
    operation: name of a JAX primitive, or "quantize" or "weight".
    inputs: values, and constants as arrays.
    output: what it computes.
    params: of the primitive; {"layer": name} of the two others.
  """

  operation: str
  inputs: tuple[Operand, ...]
  output: Value
  params: dict[str, Any]


class Layer(NamedTuple):
  """A quantized layer at the bit-width in use.

  Attributes:
    index: position of the bit-width in the candidates.
    weight, encoded: its quantizer and what it stores.
    activation, input_params: those of its input; None and {} for float input.
  """

  index: int
  weight: WeightQuantizer | None
  encoded: dict[str, jax.Array]
  activation: ActivationQuantizer | None
  input_params: dict[str, jax.Array]


class Graph(NamedTuple):
  """Nodes in an order of computation, from inputs to outputs."""

  inputs: tuple[Value, ...]
  nodes: tuple[Node, ...]
  outputs: tuple[Operand, ...]


class GraphError(ValueError):
  """What a network computes cannot be a graph."""


def trace(
  network: nnx.Module,
  sample_shape: Sequence[int],
  dtype: Any = jnp.float32,
  *,
  layers: Mapping[str, Layer],
) -> Graph:
  """Traces a deployed network.

  Args:
    network: what `deploy.load` returned, or a float network; not changed.
    sample_shape: of one example, without the batch axis.
    dtype: of the input.
    layers: quantized layers at their bit-widths; quantizers that are None stay
      the primitives that they compute with. Norms have the rows in use.

  Raises:
    ValueError: for a shape that the network does not take.
    GraphError: if the network needs to know the batch size, or a primitive has
      several outputs.
  """
  marked = nnx.clone(network)
  marked.eval()
  names = _mark(marked, layers)
  (batch,) = export.symbolic_shape("batch")
  _check_shape(network, sample_shape, dtype)
  sample = jax.ShapeDtypeStruct((batch, *sample_shape), dtype)
  return _graph(lambda x: marked(x), (sample,), names)


def _check_shape(network, sample_shape, dtype):
  """Raises ValueError for a shape that a network does not take."""
  try:
    sample = jax.ShapeDtypeStruct((1, *sample_shape), dtype)
    jax.eval_shape(lambda x: network(x), sample)
  except Exception as error:  # Networks raise what they like.
    first = command.one_line(error.args[0] if error.args else error)
    raise ValueError(
      f"sample_shape must fit the network, an example of {np.dtype(dtype)} "
      f"without the batch, got {sample_shape!r}, but: {first}"
    ) from None


def trace_function(
  function: Callable[..., Any], samples: Sequence[Any]
) -> Graph:
  """Traces a function of arrays; `samples` have their shapes and dtypes."""
  shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in samples]
  return _graph(function, shapes, {})


def stored_layers(network: nnx.Module) -> dict[str, Layer]:
  """Returns the quantized layers of a deployed network, by name.

  Raises:
    ValueError: if a layer has a float kernel.
    GraphError: if the bit-width of one is a mixture.
  """
  layers = {}
  for name, layer in nn.stored.stored_layers(network).items():
    index = layer.bits.get_value()
    if nn.bits.is_mixture(index):
      raise GraphError(f"layer {name} must have one bit-width, has a mixture")
    activation = layer.input_quantizer
    layers[name] = Layer(
      int(index),
      layer.weight_quantizer,
      layer.arrays(),
      activation,
      {} if activation is None else nn.bits.arrays_of(layer.input_params),
    )
  return layers


def _mark(network, layers) -> dict[str, tuple[str, str]]:
  """Makes quantizers calls that a jaxpr shows by name.

  Returns:
    {name of the function: (operation, layer)}.
  """
  names = {}

  def marked(operation, layer, function):
    function.__name__ = f"{operation} {layer}"
    names[function.__name__] = operation, layer
    return jax.jit(function)

  for name, layer in nn.quantized.quantized_layers(network).items():
    index, weight, encoded, activation, params = layers[name]
    layer.backend = None  # its contraction is the primitive
    if weight is not None:
      decode = marked(
        "weight", name, lambda w=weight, e=encoded, i=index: w.decode(e, i)
      )
      layer.weight_quantizer = weight._replace(
        decode=lambda e, i, decode=decode: decode()
      )
    if activation is not None:
      quantize = marked(
        "quantize",
        name,
        lambda x, a=activation, p=params, i=index: a.fake_quantize(p, x, i),
      )
      layer.input_quantizer = activation._replace(
        fake_quantize=lambda p, x, i, quantize=quantize: quantize(x)
      )
  return names


def _graph(function, samples, names):
  closed = jax.make_jaxpr(function)(*samples)
  inputs = tuple(map(_value, closed.jaxpr.invars))
  nodes: list[Node] = []
  outputs = _inline(closed.jaxpr, closed.consts, inputs, names, nodes)
  return Graph(inputs, _needed(nodes, outputs), tuple(outputs))


def _value(variable):
  return Value(tuple(variable.aval.shape), np.dtype(variable.aval.dtype))


def _inline(jaxpr, consts, inputs, names, nodes):
  """Appends the nodes of a jaxpr; returns its outputs."""
  known: dict[Any, Operand] = dict(
    zip(jaxpr.constvars, map(np.asarray, consts), strict=True)
  )
  known.update(zip(jaxpr.invars, inputs, strict=True))

  def read(atom):
    return np.asarray(atom.val) if hasattr(atom, "val") else known[atom]

  for equation in jaxpr.eqns:
    operands = tuple(map(read, equation.invars))
    name = equation.primitive.name
    if equation.params.get("name") in names and name in _CALLS:
      operation, layer = names[equation.params["name"]]
      output = _value(equation.outvars[0])
      values = tuple(x for x in operands if isinstance(x, Value))
      nodes.append(Node(operation, values, output, {"layer": layer}))
      results = [output]
    elif name in _CALLS:
      results = _call(equation.params[_CALLS[name]], operands, names, nodes)
    elif _is_constant(equation, operands):
      results = _computed(equation, operands)
    else:
      results = [_value(v) for v in equation.outvars]
      if len(results) > 1:
        raise GraphError(f"{name} has several outputs, which no node can have")
      nodes.append(Node(name, operands, results[0], dict(equation.params)))
    known.update(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _call(inner, operands, names, nodes):
  consts = getattr(inner, "consts", ())
  inner = getattr(inner, "jaxpr", inner)
  return _inline(inner, consts, operands, names, nodes)


def _is_constant(equation, operands):
  """Whether an equation can be computed: not where it depends on the batch."""
  shapes = [d for v in equation.outvars for d in v.aval.shape]
  return all(isinstance(x, np.ndarray) for x in operands) and all(
    isinstance(d, int) for d in shapes
  )


def _computed(equation, operands):
  primitive = equation.primitive
  results = primitive.bind(*map(jnp.asarray, operands), **equation.params)
  results = results if primitive.multiple_results else [results]
  return list(map(np.asarray, results))


def _needed(nodes, outputs):
  """The nodes that outputs depend on, in their order."""
  needed = {id(x) for x in outputs}
  kept = []
  for node in reversed(nodes):
    if id(node.output) in needed:
      kept.append(node)
      needed |= {id(x) for x in node.inputs}
  return tuple(reversed(kept))
