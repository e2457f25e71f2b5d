"""A network as a StableHLO program, and beside it the arrays that it takes.

`export_stablehlo` writes a directory that whoever has JAX can run without this
library:

  program.jax_export   what jax.export serialized: StableHLO bytecode, and how
                       to call it
  arrays.safetensors   codes, scales, folded norms and float parameters
  program.json         versions, arguments in their order, bits, how to run it

  program.call(arrays, images)          # one assignment
  program.call(arrays, images, bits)    # every assignment

No array of the network is a constant of the program. Weights stay packed
integers until the program decodes them, which it does in every call, so that
the directory is as small as the bit-width allows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax import export

from dr_jax import nn
from dr_jax.allocate.problem import integer
from dr_jax.deploy.export.specialize import specialize
from dr_jax.nn.quantized import layer_rows, quantized_layers
from dr_jax.runtime import command, files
from dr_jax.runtime.tree import named_leaves

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM = "program.jax_export"
ARRAYS = "arrays.safetensors"
DESCRIPTION = "program.json"

_RUN = f"""\
import jax, safetensors.numpy
from jax import export
with open("{PROGRAM}", "rb") as file:
  program = export.deserialize(bytearray(file.read()))
arrays = safetensors.numpy.load_file("{ARRAYS}")
outputs = jax.jit(program.call)(arrays, {{inputs}})"""


class Inference(NamedTuple):
  """The inference of a network as a function of its arrays.

  Attributes:
    function: `function(arrays, *inputs)`, or `function(arrays, *inputs, bits)`
      with int32 [layers], the bit-width of each layer. One that is not a
      candidate is read as the next higher one.
    arrays: {name: array}, of dtypes that safetensors has; bfloat16 as uint16.
    bits: {layer: bits} of the function; None where they are an argument.
    layers: names of the quantized layers, in the order of `bits`.
  """

  function: Callable[..., Any]
  arrays: dict[str, np.ndarray]
  bits: dict[str, int] | None
  layers: tuple[str, ...]


def inference(
  network: nnx.Module, bits: int | Mapping[str, int] | None = None
) -> Inference:
  """Makes the inference of a network a function of its arrays.

  Args:
    network: what `deploy.load` returned; it is not changed. Where its backend
      computes in integers, so does the function.
    bits: one bit-width, or {layer: bits}; None makes them an argument.

  Raises:
    ValueError: if the network holds no stored codes, not those of these bits,
      or `bits` are not its layers and candidates.
  """
  if bits is None:
    _check_whole(network)
  else:
    network = specialize(network, bits)
  layers = quantized_layers(network)
  split = nn.functional(network)
  trees = (split.params, split.batch_stats)
  leaves = named_leaves(split.params) | named_leaves(split.batch_stats)
  arrays = {
    name: _without_bfloat16(np.asarray(leaf))
    for name, leaf in leaves.items()
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  }

  def restored(arrays, name, leaf):
    if name not in arrays:  # The key of a dropout, which draws nothing here.
      return leaf
    if arrays[name].dtype == leaf.dtype:
      return arrays[name]
    return jax.lax.bitcast_convert_type(arrays[name], leaf.dtype)

  def apply(arrays, index, inputs):
    given = [restored(arrays, *item) for item in leaves.items()]
    params, stats = jax.tree.unflatten(jax.tree.structure(trees), given)
    return split.apply(params, stats, index, *inputs)[0]

  def at_any(arrays, *inputs):
    *inputs, bits = inputs
    higher = jnp.array(split.bits, jnp.int32)[None] >= bits[:, None]
    index = jnp.maximum(higher.sum(1, dtype=jnp.int32) - 1, 0)
    return apply(arrays, index, inputs)

  def at_one(arrays, *inputs):
    return apply(arrays, 0, inputs)

  return Inference(
    function=at_any if bits is None else at_one,
    arrays=arrays,
    bits=None
    if bits is None
    else {name: x.weight_quantizer.bits[0] for name, x in layers.items()},
    layers=tuple(row.name for row in layer_rows(network)),
  )


def export_stablehlo(
  path: str | os.PathLike,
  network: nnx.Module,
  sample: Any,
  *,
  bits: int | Mapping[str, int] | None = None,
  batch: int | None = None,
  platforms: Sequence[str] = PLATFORMS,
) -> None:
  """Writes the inference of a network as a StableHLO program.

  The directory appears complete or not at all.

  Args:
    path: directory to create.
    network: what `deploy.load` returned.
    sample: its input [batch, ...], an array or a jax.ShapeDtypeStruct, or a
      tuple of several.
    bits: one bit-width, or {layer: bits}; None makes them the last argument,
      int32 [layers].
    batch: size of the batch; None for a program that takes any.
    platforms: of which any can run the program.

  Raises:
    FileExistsError: if the path exists; nothing is overwritten.
    ValueError: for an input that does not fit the network, an unknown platform,
      or as `inference`.
  """
  named = not isinstance(platforms, str) and platforms
  if not named or set(platforms) - {*PLATFORMS, "rocm"}:
    raise ValueError(
      f"platforms must be a list of {', '.join(PLATFORMS)}, rocm, got "
      f"{platforms!r}"
    )
  if batch is not None:
    batch = integer("batch", batch, at_least=1)
  found = inference(network, bits)
  arguments = _arguments(found, sample, batch)
  # Arrays that a network does not read are arguments all the same: what is
  # listed is what is taken.
  function = jax.jit(found.function, keep_unused=True)
  try:
    exported = export.export(function, platforms=tuple(platforms))(*arguments)
  except Exception as error:  # Networks raise what they like.
    shapes = ", ".join(str(a.shape) for a in arguments[1:])
    raise ValueError(
      f"input {shapes} must fit the network, but: {command.first_line(error)}"
    ) from error
  description = _description(exported, found, arguments, nn.candidates(network))
  with files.atomic_directory(path) as directory:
    (directory / PROGRAM).write_bytes(exported.serialize())
    arrays = safetensors.numpy.save(found.arrays)
    (directory / ARRAYS).write_bytes(arrays)
    files.write_json(directory / DESCRIPTION, description)


def _check_whole(network):
  """Raises ValueError if a bit-width was not read from its artifact."""
  network = nnx.clone(network)
  for bits in nn.candidates(network):
    nn.set_bits(network, bits)


def _without_bfloat16(array):
  return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _arguments(found, sample, batch):
  """The arguments of the program, as shapes."""
  sample = sample if isinstance(sample, tuple) else (sample,)
  (size,) = export.symbolic_shape("batch" if batch is None else str(batch))
  inputs = [jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in sample]
  if found.bits is None:
    inputs.append(jax.ShapeDtypeStruct((len(found.layers),), jnp.int32))
  return found.arrays, *inputs


def _description(exported, found, arguments, candidates):
  """What program.json says."""
  inputs = [f"input{i}" for i in range(len(arguments) - 1)]
  if found.bits is None:
    inputs[-1] = "bits"
  names = [*sorted(found.arrays), *inputs]
  versions = re.findall(
    rb"StableHLO_v([\d.]+)", exported.mlir_module_serialized
  )
  return {
    "jax": jax.__version__,
    "stablehlo": versions[0].decode() if versions else None,
    "calling_convention_version": exported.calling_convention_version,
    "platforms": list(exported.platforms),
    "candidates": list(candidates),
    "bits": found.bits,
    "layers": list(found.layers),
    "arguments": [
      {"name": name, "dtype": str(aval.dtype), "shape": _shape(aval)}
      for name, aval in zip(names, exported.in_avals, strict=True)
    ],
    "outputs": [
      {"dtype": str(aval.dtype), "shape": _shape(aval)}
      for aval in exported.out_avals
    ],
    "run": _RUN.format(inputs=", ".join(inputs)).splitlines(),
  }


def _shape(aval):
  """Sizes of the axes; a symbolic one by its name."""
  return [n if isinstance(n, int) else str(n) for n in aval.shape]
