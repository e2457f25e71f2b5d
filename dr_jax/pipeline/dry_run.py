"""What a run would do, in words, without doing it: nothing is written.

Sizes of networks and states are those of their arrays. Times are estimates:

  seconds = 3 macs examples passes / (multiply-accumulates a second)

macs being those of one example, 3 for one pass forward and two back, examples
those of all epochs, passes the bit-widths of a step.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from rich.filesize import decimal

from dr_jax import allocate, data, nn
from dr_jax.config import Config, ConfigError, DataConfig, prefixed
from dr_jax.nn.layer_table import aligned
from dr_jax.pipeline import pipeline, throughput
from dr_jax.pipeline.comparison import Comparison
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.phases import (
  Phase,
  checkpoint_bytes,
  float_phases,
  pass_count,
  phases_of,
  state_shapes,
  step_count,
)
from dr_jax.pipeline.stages import STAGES
from dr_jax.pipeline.stages.stage import no_phases
from dr_jax.pipeline.workdir import Workdir
from dr_jax.runtime import files, sharding, tree

_COLUMNS = ("name", "kind", "shape", "stride", "parameters", "macs")
_TRAINING = ("phase", "steps", "passes", "operations", "about")
_MEMORY = ("phase", "parameters", "optimizer", "other", "checkpoints")


class Network(NamedTuple):
  """The network of a run.

  Attributes:
    table: of the layers that are quantized.
    parameters: number of its float parameters.
    macs: multiply-accumulates of one example, in all of its layers.
  """

  table: nn.LayerTable
  parameters: int
  macs: int


def describe(config: Config, workdir: str | os.PathLike) -> str:
  """Returns what a run would do, after all checks that precede its training.

  Data that are not on this machine are no error: a line says what cannot be
  said without them.

  Raises:
    ConfigError, ValueError: as `pipeline.run`.
  """
  pipeline.check_stages(config)
  run, missing = _context(config, workdir)
  paragraphs = [_configuration(config)]
  if run is not None:
    pipeline.check(run)
    stages = [STAGES[name] for name in config.stages]
    phases = [phase for stage in stages for phase in stage.phases(run)]
    network = _network(run)
    paragraphs += [
      _layers(run, network),
      _sizes(network.table, config.quant.bits),
      _memory(run, phases),
      _times(run, network, phases, missing, _untrained(config)),
    ]
    disk = sum(pipeline.disk_bytes(run).values())
    paragraphs.append(
      f"disk: at most {decimal(disk)} in {files.expand(workdir)}; nothing was "
      "written"
    )
  return "\n\n".join([*paragraphs, *_missing(run, missing)])


def describe_comparison(
  comparison: Comparison, workdir: str | os.PathLike
) -> str:
  """Returns what a comparison would do, as `describe` does for a run."""
  workdir = files.expand(workdir)
  for seed, (name, entry) in itertools.product(
    comparison.seeds, comparison.entries.items()
  ):
    config = dataclasses.replace(entry.config, seed=seed)
    Workdir(workdir / f"seed{seed}" / name).check(config, {})
  first = dataclasses.replace(comparison.base, seed=comparison.seeds[0])
  run, missing = _context(first, workdir / f"seed{first.seed}" / "float")
  paragraphs = [_configuration(first), _methods(comparison)]
  if run is not None:
    pipeline.check(run)
    phases = float_phases("float", first.pretrain)
    for name, entry in comparison.entries.items():
      quant = entry.config.quant
      phases += phases_of(name, entry.config.train, quant)
    network = _network(run)
    paragraphs.append(_layers(run, network))
    paragraphs.append(
      _times(run, network, phases, missing, seeds=comparison.seeds)
    )
  return "\n\n".join([*paragraphs, *_missing(run, missing)])


def _context(
  config: Config, workdir: str | os.PathLike
) -> tuple[RunContext | None, data.MissingData | None]:
  """The run, and the error of data that are not there.

  Images of the same size take their place, as far as that is known; else there
  is no run.
  """
  try:
    return RunContext(config, workdir), None
  except ConfigError as error:
    missing = error.__cause__
    if not isinstance(missing, data.MissingData):
      raise
  size = config.data.image_size or (missing.shape or (0,))[0]
  if not size or not missing.num_classes:
    return None, missing
  batch = sharding.layout(**dataclasses.asdict(config.devices)).mesh.size
  synthetic = DataConfig(
    name="synthetic",
    batch_size=batch,
    image_size=size,
    classes=missing.num_classes,
    channels=missing.shape[-1] or 0,
    examples=batch,
  )
  run = RunContext(dataclasses.replace(config, data=synthetic), workdir)
  run.config = config
  return run, missing


def _configuration(config):
  text = json.dumps(dataclasses.asdict(config), indent=2)
  return f"configuration, as config.json has it:\n{text}"


def _methods(comparison):
  """What is each method's own, as fields that differ from the base's."""
  base = dict(_leaves(dataclasses.asdict(comparison.base)))
  lines = []
  for name, entry in comparison.entries.items():
    own = dict(_leaves(dataclasses.asdict(entry.config)))
    keys = [key for key in own if own[key] != base.get(key)]
    keys = [key for key in keys if key != "stages"]
    fields = ", ".join(f"{key}={own[key]!r}" for key in keys)
    lines.append(f"{name}: {fields or 'as above'}")
  seeds = ", ".join(map(str, comparison.seeds))
  return "\n".join([f"methods, with seeds {seeds}:", *lines])


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[Any]:
  for key, value in values.items():
    if isinstance(value, dict) and value:
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _network(run) -> Network:
  model, sample = run.zeros(), run.sample[:1]
  network = nn.quantize(model, weight=run.weight, sample=sample)
  rows = nn.coverage(model, network, sample)
  return Network(
    nn.layer_table(network),
    sum(leaf.size for leaf in jax.tree.leaves(run.shape.params)),
    sum(row.macs or 0 for row in rows),
  )


def _layers(run, network):
  quantized = sum(row.macs for row in network.table)
  weights = sum(row.parameters for row in network.table)
  return (
    f"network: {run.config.model.name}, {network.parameters:,} parameters, "
    f"{network.macs:,} multiply-accumulates an example\n"
    f"quantized: {len(network.table)} layers, {weights:,} weights, "
    f"{quantized:,} multiply-accumulates\n\n{aligned(_rows(network.table))}"
  )


def _rows(table):
  """The columns of a layer table that do not depend on values."""
  yield _COLUMNS
  for row in table:
    cells = row._asdict()
    yield (str(cells[column]) for column in _COLUMNS)


def _sizes(table, bits):
  stored = allocate.stored_bits([row.parameters for row in table], bits)
  rows = [("float", f"{4 * sum(row.parameters for row in table):,}")]
  rows += [
    (str(b), f"{int(column.sum()) // 8:,}")
    for b, column in zip(bits, stored.T, strict=True)
  ]
  return aligned(
    [("bits", "bytes of quantized weights, without scales"), *rows]
  )


def _memory(run, phases: Sequence[Phase]):
  rows = []
  for phase in phases:
    state = state_shapes(run, phase)
    parts = state.params, state.opt_state, (state.batch_stats, state.memory)
    sizes = [*map(tree.array_bytes, parts)]
    sizes.append(checkpoint_bytes(phase.recipe, state))
    rows.append((phase.stage, *map(decimal, sizes)))
  return (
    "memory of what is trained, and its checkpoints on disk at most; "
    "activations come on top:\n"
    f"{aligned([_MEMORY, *rows])}"
  )


def _times(run, network, phases, missing, others=(), seeds=(0,)):
  """Steps, operations and about how many seconds of every phase."""
  batch = run.config.data.batch_size
  speed = throughput.measure(
    network.table, batch=batch, dtype=run.config.model.dtype
  )
  rate = speed.macs_per_second
  devices = run.layout.mesh.size
  where = "one device" if devices == 1 else f"{devices} devices"
  assumed = (
    f"products on {where}, if all are as fast as those measured now "
    f"({speed.products} kinds, {100 * speed.share:.0f} % of the work in "
    f"quantized layers), {2 * rate / 1e9:.3g} billion operations a second; "
    "rounding, norms, data and compilation come on top"
  )

  def seconds(examples):
    return 3 * network.macs * examples / rate / devices

  if missing is not None:
    return (
      "training at one bit-width takes about "
      f"{_duration(seconds(10**6))} for a million examples: {assumed}"
    )
  rows, total = [_TRAINING], 0.0
  for phase in phases:
    steps, passes = step_count(run, phase), pass_count(phase)
    examples = steps * batch * passes
    total += seconds(examples) * len(seeds)
    cells = (
      f"{steps:,}",
      str(passes),
      f"{6.0 * network.macs * examples:.2g}",
    )
    rows.append((phase.stage, *cells, _duration(seconds(examples))))
  times = f" for {len(seeds)} seeds" if len(seeds) > 1 else ""
  lines = [
    f"{len(run.data.train):,} examples to train on, "
    f"{len(run.data.test):,} to test on; training:",
    aligned(rows),
    f"about {_duration(total)}{times}: {assumed}",
  ]
  if others:
    lines.append(f"not estimated: {', '.join(others)}")
  return "\n".join(lines)


def _untrained(config):
  """Stages besides training that take a while."""
  return [name for name in config.stages if STAGES[name].phases is no_phases]


def _missing(run, missing):
  if missing is None:
    return
  unknown = "steps and times"
  if run is None:
    unknown = "the network, whose sizes they decide, steps and times"
  reason = prefixed("data", missing)
  yield f"data are not there, so {unknown} cannot be told: {reason}"


def _duration(seconds: float) -> str:
  """A time in words.

  >>> _duration(0.01), _duration(90), _duration(200_000)
  ('0.01 s', '1.5 min', '2.3 days')
  """
  for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
    if seconds >= size:
      return f"{seconds / size:.2g} {unit}"
  return f"{seconds:.2g} s"
