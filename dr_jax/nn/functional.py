"""A network as one pure function over plain nested dicts of arrays.

Everything that trains, shards or checkpoints works on this view: string keys,
array leaves, no Flax objects. The network is split once; `apply` merges it
again inside the trace, which costs tracing time only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax.nn.attention import QuantizedOperand
from dr_jax.nn.bits import (
  Bits,
  NormParam,
  Offset,
  Scale,
  all_bits,
  is_mixture,
)
from dr_jax.nn.leaves import (
  Tree,
  filled,
  item_at,
  nested,
  split_leaves,
  value_of,
  with_value,
)
from dr_jax.nn.quantized import Quantized, candidates, layer_rows


class Functional(NamedTuple):
  """A network split into a pure function and its arrays.

  Attributes:
    apply: `apply(params, batch_stats, index, *inputs, train=False) ->
      (outputs, batch_stats)`. `index` is the position in the candidate
      bit-widths: an int or int32 scalar for all layers, or int32 [layers], one
      per row of `nn.layer_table`; a float network ignores it. Float
      [layers, n], weights over the n candidates, mixes what they quantize to.
      Keyword arguments go to the model's `__call__`, `train` too if it takes
      one.
    params: nested dict of trainable arrays.
    batch_stats: nested dict of all other state (running statistics, PRNG
      counters, arrays that are plain attributes of modules).
    bits: candidate bit-widths, highest first; empty for a float network.
    param_labels: nested dict like params, saying what each leaf is: "weight",
      "vector" (biases, float norms), "norm" (the rows of a quantized network's
      norm), "scale" (learned scales of quantizers) or "offset" (their other
      learned parameters).
    layers: number of quantized layers; 0 for a float network.
    scale_layers: number of the layer of every learned scale, in the order in
      which `jax.tree.leaves(params)` has them; of a stack of layers the numbers
      of all, with its axes. A scale of a product has that of the layer whose
      bits it follows.
  """

  apply: Callable[..., tuple[Any, Tree]]
  params: Tree
  batch_stats: Tree
  bits: tuple[int, ...]
  param_labels: Tree
  layers: int
  scale_layers: tuple[np.ndarray, ...]


def functional(model: nnx.Module) -> Functional:
  """Splits a network, float or quantized, into a function and its arrays.

  The model is not changed, and later changes to it have no effect on what is
  returned; see `nn.update` for the way back.

  Args:
    model: a float network, or what `nn.quantize` or `deploy.load` returned.

  >>> from dr_jax import nn, quant
  >>> rngs = nnx.Rngs(0)
  >>> layers = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
  >>> network = nn.quantize(
  ...   nnx.Sequential(*layers),
  ...   weight=quant.double_rounding((8, 4)),
  ...   sample=jnp.ones((1, 4)),
  ...   skip=(),
  ... )
  >>> split = nn.functional(network)
  >>> split.bits, split.layers, sorted(split.params["layers"]["0"])
  ((8, 4), 2, ['bias', 'kernel', 'weight_params'])
  >>> x = jnp.ones((3, 4))
  >>> lowest, _ = split.apply(split.params, split.batch_stats, 1, x)
  >>> lowest.shape
  (3, 2)
  """
  graph, (params, bits, rest) = split_leaves(model, nnx.Param, Bits, ...)
  followed = dict(_without_arrays(all_bits(model)))
  layers = len(layer_rows(model))
  candidate_bits = candidates(model) if layers else ()
  # Without their arrays, which would live as long as `apply`.
  kept_params, kept_bits, kept_rest = map(_without_arrays, (params, bits, rest))
  takes_train = "train" in inspect.signature(model).parameters

  def apply(params_tree, stats_tree, index, *inputs, train=False, **kwargs):
    shape = np.shape(index)
    if layers:
      _check_index(index, layers, len(candidate_bits))

    def bits_at(path):
      variable = followed[path]
      if shape:
        return variable.at(index)
      if variable.stack:
        return jnp.broadcast_to(index, variable.stack)
      return index

    state = nnx.from_flat_state(
      [(p, with_value(v, item_at(params_tree, p))) for p, v in kept_params]
      + [(p, with_value(v, item_at(stats_tree, p))) for p, v in kept_rest]
      + [(p, with_value(v, bits_at(p))) for p, v in kept_bits]
    )
    merged = nnx.merge(graph, state, copy=True)
    merged.train() if train else merged.eval()
    if takes_train:
      kwargs["train"] = train
    outputs = merged(*inputs, **kwargs)
    flat = dict(nnx.to_flat_state(nnx.state(merged)))
    return outputs, nested(
      (path, value_of(flat[path])) for path, _ in kept_rest
    )

  return Functional(
    apply=apply,
    params=nested((path, value_of(v)) for path, v in params),
    batch_stats=nested((path, value_of(v)) for path, v in rest),
    bits=candidate_bits,
    param_labels=nested((path, _label(path, v)) for path, v in params),
    layers=layers,
    scale_layers=_scale_layers(model, params),
  )


def update(model: nnx.Module, *, params: Tree, batch_stats: Tree) -> None:
  """Writes trained arrays back into a model, in place.

  Args:
    model: the network that `functional` was called on, or an equal one.
    params, batch_stats: nested dicts as `functional` returns them.

  Raises:
    ValueError: if an array is missing, left over or has another shape;
      nothing is changed then.
  """
  _, (trained, _, rest) = split_leaves(model, nnx.Param, Bits, ...)
  writes = filled(trained, params) + filled(rest, batch_stats)
  nnx.update(model, nnx.from_flat_state(writes))


def _check_index(index, layers, count):
  shape = np.shape(index)
  if is_mixture(index):
    if shape != (layers, count):
      raise ValueError(
        f"index must have shape ({layers}, {count}), a weight for each "
        f"quantized layer and candidate, got {shape}"
      )
  elif shape not in ((), (layers,)):
    raise ValueError(
      f"index must have shape () or ({layers},), one for each quantized layer, "
      f"got {shape}"
    )


def _scale_layers(model, params):
  # A scale is at <layer>/weight_params/scale or <layer>/input_params/scale.
  numbers = {
    path: layer.numbers
    for path, layer in nnx.iter_modules(model)
    if isinstance(layer, Quantized | QuantizedOperand)
  }
  found = nested(
    (path, numbers[path[:-2]] if isinstance(v, Scale) else None)
    for path, v in params
  )
  return tuple(jax.tree.leaves(found))


def _label(path, variable):
  if isinstance(variable, Scale):
    return "scale"
  if isinstance(variable, Offset):
    return "offset"
  if isinstance(variable, NormParam):
    return "norm"
  # A bias has several axes where its layer's features have, or in a stack.
  if variable.ndim < 2 or path[-1] in ("bias", "scale"):
    return "vector"
  return "weight"


def _without_arrays(leaves):
  return [(path, with_value(leaf, None)) for path, leaf in leaves]
