"""Writes an artifact in a format that other programs read.

python -m dr_jax.export --artifact=runs/digits/export/model
    --format=stablehlo --bits=4 --input_shape=8,8,1 --output=digits_4

Formats; see dr_jax/deploy/export/README.md:
  stablehlo    a directory: program for CPU, CUDA and TPU, arrays, program.json
  onnx         a file with integer weights, as ONNX Runtime computes
  safetensors  a file: integers and scales in the names and layouts of PyTorch

Exit codes:
    0: written
    1: an error that nobody expected, with its traceback
    2: bad input, or files that cannot be read or written; nothing is left
  130: stopped by Ctrl-C; nothing is left
  141: written, but whoever read standard output closed it
"""

from __future__ import annotations

from dr_jax.runtime import command

# The imports below take seconds.
if __name__ == "__main__":
  command.stop_on_interrupt("nothing was written")

from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from dr_jax import allocate, deploy, models
from dr_jax.deploy.export.onnx.export import ARITHMETICS, OPSET, WEIGHT_TYPES
from dr_jax.deploy.export.stablehlo import PLATFORMS
from dr_jax.runtime import compilation, files

_ARTIFACT = flags.DEFINE_string(
  "artifact", None, "Directory of the artifact, as a run's export/model."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "What to create; it must not exist."
)
_BITS = flags.DEFINE_string(
  "bits",
  None,
  "A bit-width; an allocation's file, as a run's export/allocations/*.json; or "
  "all: they are an input of what is written (stablehlo, onnx).",
)
_INPUT_SHAPE = flags.DEFINE_list(
  "input_shape",
  None,
  "Shape of one input without the batch, as 224,224,3 (stablehlo, onnx).",
)
_BATCH = flags.DEFINE_integer(
  "batch",
  None,
  "Size of the batch; any by default (stablehlo).",
  lower_bound=1,
)
_PLATFORMS = flags.DEFINE_list(
  "platforms", list(PLATFORMS), "Where the program can run (stablehlo)."
)
_OPSET = flags.DEFINE_integer("opset", OPSET, "ONNX operator set (onnx).")
_ARITHMETIC = flags.DEFINE_enum(
  "arithmetic",
  ARITHMETICS[0],
  list(ARITHMETICS),
  "exact, or fused: faster; at 8 bits a few codes are off by one (onnx).",
)
_WEIGHT_TYPE = flags.DEFINE_enum(
  "weight_type",
  WEIGHT_TYPES[0],
  list(WEIGHT_TYPES),
  "Narrowest type that weights are stored in, for one --bits (onnx).",
)


def _stablehlo(artifact, bits, output):
  network, sample = _network(artifact)
  deploy.export_stablehlo(
    output,
    network,
    sample,
    bits=bits,
    batch=_BATCH.value,
    platforms=_PLATFORMS.value,
  )
  return []


def _onnx(artifact, bits, output):
  options = {"opset": _OPSET.value, "arithmetic": _ARITHMETIC.value}
  weight_type = _WEIGHT_TYPE.value
  if bits is None and weight_type != WEIGHT_TYPES[0]:
    raise ValueError(
      f"--weight_type must be {WEIGHT_TYPES[0]} with --bits=all, got "
      f"{weight_type}"
    )
  network, sample = _network(artifact)
  shape = sample.shape[1:]
  try:
    if bits is None:
      found = deploy.export_onnx_switchable(output, network, shape, **options)
    else:
      options["weight_type"] = weight_type
      exact = deploy.export_onnx(output, network, shape, bits=bits, **options)
      found = {_BITS.value: exact}
  except ImportError as error:
    raise ValueError(error) from None
  except MemoryError as error:  # Positions of a convolution's windows.
    raise ValueError(
      f"--input_shape={','.join(map(str, shape))} must fit in memory, but: "
      f"{command.one_line(error)}"
    ) from None
  return [
    f"bits {bits}: {sum(map(sum, exact.values()))} of "
    f"{sum(map(len, exact.values()))} fused channels are exact"
    for bits, exact in found.items()
    if exact
  ]


def _safetensors(artifact, bits, output):
  if bits is None:
    raise ValueError("--bits=all must come with --format=stablehlo or onnx")
  deploy.export_safetensors(output, artifact, bits=bits)
  return []


_FORMATS = {
  "stablehlo": _stablehlo,
  "onnx": _onnx,
  "safetensors": _safetensors,
}
# Flags that not all formats have.
_FORMATS_OF = {
  "input_shape": ("stablehlo", "onnx"),
  "batch": ("stablehlo",),
  "platforms": ("stablehlo",),
  "opset": ("onnx",),
  "arithmetic": ("onnx",),
  "weight_type": ("onnx",),
}
_FORMAT = flags.DEFINE_enum("format", None, list(_FORMATS), "What to write.")


def start() -> None:
  """Runs the command with the arguments of this process, and ends it."""
  command.start(_main)


def _main():
  compilation.cache_on_disk()
  output, notes = _export()
  lines = [f"{output}: {files.size(output):,} bytes", *notes]
  return command.show(lambda: print(*lines, sep="\n"), output)


def _export():
  """Writes what the flags say; returns where, and what is to be known of it."""
  path, format, bits, output = command.required(
    _ARTIFACT, _FORMAT, _BITS, _OUTPUT
  )
  for name, formats in _FORMATS_OF.items():
    if flags.FLAGS[name].present and format not in formats:
      raise ValueError(
        f"--{name} must come with --format={' or '.join(formats)}, got "
        f"--format={format}"
      )
  output = files.expand(output)
  files.check_absent(output)
  bits = _bits(bits)
  return output, _FORMATS[format](deploy.open(path, bits), bits, output)


def _bits(given: str) -> Any:
  """The bit-width or allocation of --bits; None for all."""
  if given == "all":
    return None
  return allocate.read_assignment(given, allowed="a bit-width, all,")


def _network(artifact):
  """The network that the artifact names, and its input as a shape."""
  if artifact.manifest["architecture"] is None:
    raise ValueError(
      f"{artifact.path} names no architecture, of which the command builds the "
      "network: export deploy.load(path, model=network) in Python"
    )
  sizes = _INPUT_SHAPE.value
  if not sizes or not all(n.isdecimal() and int(n) > 0 for n in sizes):
    raise ValueError(
      "--input_shape must be the sizes of one input without the batch, as "
      f"224,224,3, got {','.join(sizes or ['nothing'])}"
    )
  network = artifact.load()
  name, _ = artifact.manifest["architecture"]
  dtype = jnp.int32 if name in models.TASKS["language"] else jnp.float32
  sample = jax.ShapeDtypeStruct((1, *map(int, sizes)), dtype)
  try:
    jax.eval_shape(lambda x: network(x), sample)
  except Exception as error:  # Networks raise what they like.
    first = command.one_line(error.args[0] if error.args else error)
    raise ValueError(
      f"--input_shape={','.join(sizes)} must fit the network, but: {first}"
    ) from None
  return network, sample


if __name__ == "__main__":
  start()
