"""Which backend the quantized layers of a network compute with."""

from __future__ import annotations

import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax.nn import backends, plane_call
from dr_jax.nn.inputs import Inputs
from dr_jax.nn.quantized import quantized_layers
from dr_jax.nn.stored import Stored


def set_backend(model: nnx.Module, name: str, *, sample: Any = None) -> None:
  """Sets how every quantized layer computes, in place.

  Values are the same but for the order of float sums. What `nn.quantize`
  returned then computes forward in integers while it trains, with the gradients
  of the float layers; what `deploy.load` returned serves in integers.

  Args:
    model: what `nn.quantize` or `deploy.load` returned.
    name: "float": kernel and inputs are decoded, and the float layer computes.
      "integer": int8 convolutions and products of XLA. "im2col": one int8
      product of gathered patches. "carrier": float convolutions and products of
      integers, in float32 on a CPU and bfloat16 elsewhere, in as many parts as
      make them exact. "planes": float inputs by weights that are read as
      bit-planes, in linear layers (`quant.matmul`). "auto": the fastest of
      these on this device, by `time_backends`.
    sample: for "auto", inputs as the network will get them.

  Raises:
    ValueError: if there is no such backend, or it cannot compute a layer: it
      names the layer and says why; nothing is changed then.

  >>> from dr_jax import nn, quant
  >>> rngs = nnx.Rngs(0)
  >>> network = nn.quantize(
  ...   nnx.Linear(4, 6, rngs=rngs),
  ...   weight=quant.double_rounding((8, 4)),
  ...   activation=quant.lsq_activation((8, 4)),
  ...   sample=jnp.ones((1, 4)),
  ...   skip=(),
  ... )
  >>> y = network(jnp.ones((1, 4)))
  >>> nn.set_backend(network, "integer")
  >>> bool(jnp.allclose(network(jnp.ones((1, 4))), y, rtol=1e-6))
  True
  """
  if name == "auto":
    if sample is None:
      raise ValueError("sample must be inputs of the network for 'auto'")
    name = next(iter(time_backends(model, sample)))
  elif name not in backends.BACKENDS:
    allowed = (*backends.BACKENDS, "auto")
    raise ValueError(f"backend must be one of {allowed}, got {name!r}")
  backend = backends.get(name)
  layers = quantized_layers(model)
  if not layers:
    raise ValueError(
      "model must have a quantized layer; call nn.quantize first"
    )
  chunks = {
    path: _checked(path, layer, backend) for path, layer in layers.items()
  }
  for path, layer in layers.items():
    layer.set_backend(backend, chunks[path])


def supports(model: nnx.Module, name: str) -> bool:
  """Returns whether a backend can compute every quantized layer of a network.

  Args:
    model: what `nn.quantize` or `deploy.load` returned.
    name: of `nn.BACKENDS`.
  """
  backend = backends.get(name)
  try:
    for path, layer in quantized_layers(model).items():
      _checked(path, layer, backend)
  except ValueError:
    return False
  return True


def time_backends(
  model: nnx.Module, sample: Any, *, rounds: int = 7
) -> dict[str, float]:
  """Measures one call of a network with every backend that supports it.

  Backends take turns: other work on the machine slows all of them.

  Args:
    model: what `deploy.load` returned; it is not changed.
    sample: inputs as the network will get them, as for `nn.quantize`; which
      backend is the fastest depends on the batch size.
    rounds: timed calls of each backend, after one that compiles.

  Returns:
    {backend: median seconds of a call}, the fastest first.
  """
  inputs = Inputs.of(sample)
  calls = {}
  for name in backends.BACKENDS:
    if supports(model, name):
      copy = nnx.clone(model)
      set_backend(copy, name)
      calls[name] = _compiled(copy, inputs)
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      started = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - started)
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  return dict(sorted(medians.items(), key=lambda item: item[1]))


def _compiled(model, inputs):
  graph, state = nnx.split(model)

  @jax.jit
  def call(state, inputs):
    network = nnx.merge(graph, state, copy=True)
    return network(*inputs.args, **inputs.kwargs)

  jax.block_until_ready(call(state, inputs))
  return functools.partial(call, state, inputs)


def _checked(path, layer, backend):
  """Parts that the sums of a layer are computed in; ValueError if it cannot."""
  if backend is None:
    return 1
  if isinstance(backend, backends.Planes):
    reason = plane_call.unsupported(layer)
    if reason is None:
      return 1
  elif (reason := _unsupported(layer, backend)) is None:
    chunks = _chunks(layer, backend)
    if chunks == 1 or getattr(layer, "feature_group_count", 1) == 1:
      return chunks
    reason = "its groups have too many inputs for exact sums"
  raise ValueError(
    f"backend {backend.name!r} cannot compute layer {path}: {reason}; choose "
    "another, as 'float'"
  )


def _unsupported(layer, backend):
  weight, inputs = layer.weight_quantizer, layer.input_quantizer
  if backend.platforms and jax.default_backend() not in backend.platforms:
    return f"it runs on {' and '.join(backend.platforms)} alone"
  if not _computes_in_integers(layer):
    return "integers serve convolutions and products that are not stacked"
  if inputs is None:
    return "its inputs stay float"
  for quantizer in (weight, inputs):
    if quantizer.integers is None:
      return f"values of {quantizer.name} are not integers times a scale"
  for codes in _dtypes(layer):
    if str(codes) not in backend.dtypes:
      return f"codes must be {' or '.join(backend.dtypes)}, got {codes}"
  return None


def _computes_in_integers(layer):
  if layer.computes_as is nnx.LinearGeneral:
    return not layer.batch_axis and not layer.stack
  return layer.computes_as in (nnx.Conv, nnx.Linear) and not layer.stack


def _dtypes(layer):
  """Dtypes of the codes of inputs and kernel."""
  # Of more axes than any layer names.
  inputs = jax.ShapeDtypeStruct((1,) * 8, jnp.float32)

  def operands(inputs):
    return layer.integer_operands(inputs, layer.kernel[...])

  x, w = jax.eval_shape(operands, inputs)
  return x.codes.dtype, w.codes.dtype


def _chunks(layer, backend):
  """Parts of the sums of a layer, each exact whatever the inputs are."""
  largest_x, largest_w = (
    _largest(dtype, quantizer.bits[0])
    for dtype, quantizer in zip(
      _dtypes(layer),
      (layer.input_quantizer, layer.weight_quantizer),
      strict=True,
    )
  )
  *window, _ = layer.columns.shape
  reach = math.prod(window) * largest_w
  if reach * largest_x > backend.exact and isinstance(layer, Stored):
    reach = _largest_sum(layer)
  return max(1, -(-reach * largest_x // backend.exact))


def _largest(dtype, bits):
  """Size of the largest code of a bit-width; 16-bit codes are odd ones."""
  if dtype == jnp.int8:
    return 2 ** (bits - 1)
  return 2**bits - 1


def _largest_sum(layer):
  """The largest sum of |w| over the inputs of a channel, at any bit-width."""
  weight, encoded = layer.weight_quantizer, layer.arrays()

  @jax.jit
  def largest(encoded, index):
    codes = weight.integers(encoded, index).codes.astype(jnp.int32)
    return jnp.abs(codes).sum(tuple(range(codes.ndim - 1))).max()

  return max(int(largest(encoded, i)) for i in range(len(weight.bits)))
