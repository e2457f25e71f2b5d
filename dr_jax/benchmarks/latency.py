"""Milliseconds of a deployed network and of its layers, at every bit-width.

  python -m dr_jax.benchmarks.latency --artifact=DIR --image-size=32
      [--batch=1] [--backend=integer] [--output=latency.json]
  python -m dr_jax.benchmarks.latency --model=resnet50 [--image-size=224] ...

Measures on this device, takes medians over rounds in which all take turns, and
writes an `allocate.LatencyTable`: what `deploy.Switchable(latency=FILE)` and
`search.costs=latency` with `search.latency=FILE` go by. A named network is
quantized with random weights: time depends on shapes.

The network, and each layer, is one program for all bit-widths, as it is served.
A backend that does the same work at every bit-width takes the same time at
every bit-width, and the table says so. A layer alone includes the quantization
of its inputs, the decoding of its kernel and the call; what XLA fuses over
layers, and layers that stay float, only the network shows.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from dr_jax import deploy, nn
from dr_jax.allocate import LatencyTable
from dr_jax.benchmarks import network
from dr_jax.benchmarks.rows import Rows, prepared, turns
from dr_jax.nn.observe import observed
from dr_jax.nn.quantized import candidates, quantized_layers
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command, compilation, files

FLAGS = flags.FLAGS


# A call at one position among the candidate bit-widths.
Call = Callable[[Any], Any]


def define_flags() -> None:
  """Defines what the command takes; some names are also those of others."""
  flags.DEFINE_string("artifact", None, "Directory of an artifact.")
  flags.DEFINE_enum("model", None, network.NAMES, "Named network.")
  flags.DEFINE_list(
    "bits", ["8", "6", "4", "2"], "Bit-widths of a named network."
  )
  flags.DEFINE_integer("batch", 1, "Images per call.", lower_bound=1)
  flags.DEFINE_integer(
    "image_size",
    0,
    "Height and width of an image; 0 for that of a named network.",
    lower_bound=0,
  )
  flags.DEFINE_enum(
    "backend", "float", tuple(nn.BACKENDS), "How layers compute."
  )
  flags.DEFINE_integer("rounds", 11, "Timed calls of each.", lower_bound=1)
  flags.DEFINE_string("output", "latency.json", "File to write.")
  for alias, name in (
    ("batch-size", "batch"),
    ("batch_size", "batch"),
    ("image-size", "image_size"),
  ):
    flags.DEFINE_alias(alias, name)


def main():
  if (FLAGS.artifact is None) == (FLAGS.model is None):
    raise ValueError("one of artifact and model must be given")
  if not FLAGS.output or files.expand(FLAGS.output).is_dir():
    raise ValueError(f"output must be a file, got {FLAGS.output!r}")
  compilation.cache_on_disk()
  served, channels, size = _from_artifact() if FLAGS.artifact else _named()
  nn.set_backend(served, FLAGS.backend)
  shape = (FLAGS.batch, size, size, channels)
  table = measure(
    served,
    np.random.default_rng(0).standard_normal(shape, np.float32),
    rounds=FLAGS.rounds,
    about={
      "network": FLAGS.artifact or FLAGS.model,
      "batch": FLAGS.batch,
      "image_size": size,
      "backend": FLAGS.backend,
      "rounds": FLAGS.rounds,
      "environment": environment(),
    },
  )
  table.save(FLAGS.output)
  print_table(table)
  print(environment())


def _from_artifact():
  """A network, its channels and the size of its images."""
  artifact = deploy.open(FLAGS.artifact)
  architecture = artifact.manifest["architecture"]
  if architecture is None:
    raise ValueError(
      f"artifact must name its architecture, but {FLAGS.artifact} does not"
    )
  if not FLAGS.image_size:
    raise ValueError("image_size must be >= 1 with an artifact, got 0")
  return artifact.load(), architecture[1].get("channels", 3), FLAGS.image_size


def _named():
  bits = network.bit_widths(FLAGS.bits)
  setting = network.Setting(FLAGS.model, FLAGS.image_size, bits=bits)
  parts = nn.deployed.parts_of(setting.quantized())
  return nn.deployed.assemble(setting.floating(), parts), 3, setting.size


def measure(
  served: nnx.Module,
  x: np.ndarray,
  *,
  rounds: int,
  about: Mapping[str, Any] | None = None,
) -> LatencyTable:
  """Times a network and its layers at every bit-width.

  Args:
    served: what `deploy.load` returned.
    x: a batch of inputs.
    rounds: timed calls of each.
    about: what the table says of itself.
  """
  bits = candidates(served)
  layers = quantized_layers(served)
  inputs = layer_inputs(served, x)
  calls = [prepared("network", lambda: _compiled(served, x))]
  for name, layer in layers.items():
    call = functools.partial(_compiled, layer, inputs[name])
    calls.append(prepared(name, call))
  network_ms, *layers_ms = _medians(calls, len(bits), rounds)
  return LatencyTable(
    network=dict(zip(bits, network_ms, strict=True)),
    layers={
      name: dict(zip(bits, row, strict=True))
      for name, row in zip(layers, layers_ms, strict=True)
    },
    measured=dict(about or {}),
  )


def layer_inputs(model: nnx.Module, x: np.ndarray) -> dict[str, jax.Array]:
  """Random inputs as each quantized layer gets them, in its first call."""
  found: dict[str, jax.ShapeDtypeStruct] = {}

  def record(name, module, method, x, y):
    del module, method, y
    found.setdefault(name, jax.ShapeDtypeStruct(x.shape, x.dtype))

  copy = observed(model, quantized_layers(model), record)
  jax.eval_shape(lambda x: copy(x), x)
  rng = np.random.default_rng(0)
  return {
    name: jnp.asarray(rng.standard_normal(of.shape, np.float32), of.dtype)
    for name, of in found.items()
  }


def _compiled(model: Any, x: Any) -> Call:
  """One program for all bit-widths."""
  split = nn.functional(model)

  @jax.jit
  def run(params, batch_stats, index, x):
    return split.apply(params, batch_stats, index, x)[0]

  def call(index):
    return jax.block_until_ready(run(split.params, split.batch_stats, index, x))

  call(jnp.int32(0))
  return call


def _medians(calls, count, rounds):
  """Median milliseconds of every call at each of `count` positions."""
  indices = [jnp.int32(position) for position in range(count)]
  times: list[list[list[float]]] = [[[] for _ in indices] for _ in calls]
  for turn in turns(rounds):
    for call, rows in zip(calls, times, strict=True):
      # None is always the first after another program, with cold caches.
      for position in np.roll(range(count), turn):
        started = time.perf_counter()
        call(indices[position])
        rows[position].append(1000 * (time.perf_counter() - started))
  return [[statistics.median(row) for row in rows] for rows in times]


def print_table(table: LatencyTable) -> None:
  """Prints the times of the network, and of all its layers alone."""
  about = table.measured
  rows = Rows(
    f"{about.get('network', '')}, batch {about.get('batch', '')}, "
    f"{about.get('image_size', '')} pixels, backend {about.get('backend', '')}",
    ("bits", "network ms", f"{len(table.layers)} layers alone, sum ms"),
    left=0,
  )
  for b, ms in table.network.items():
    layers = sum(row[b] for row in table.layers.values())
    rows.add(str(b), f"{ms:.3f}", f"{layers:.3f}")
  rows.end()


if __name__ == "__main__":
  define_flags()
  command.start(main)
