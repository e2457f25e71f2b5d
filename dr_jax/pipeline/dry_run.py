"""What a run would do, in words, without doing it: nothing is written.

Sizes of networks and states are those of their arrays; activations are counted
in the trace of a pass (`train.residual_bytes`); times are estimates
(`pipeline.times`). No step is compiled, which would take minutes.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from rich.filesize import decimal

from dr_jax import allocate, data, nn
from dr_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  prefixed,
  quantizers,
)
from dr_jax.nn.layer_table import aligned
from dr_jax.pipeline import pipeline, times
from dr_jax.pipeline.comparison import Comparison
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.phases import Phase, checkpoint_bytes, memory
from dr_jax.pipeline.stages import STAGES
from dr_jax.pipeline.workdir import Workdir
from dr_jax.runtime import files, sharding, tree

_COLUMNS = ("name", "kind", "shape", "stride", "parameters", "macs")
_MEMORY = (
  "phase",
  "parameters",
  "optimizer",
  "other",
  "activations",
  "checkpoints",
)


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
    paragraphs += _estimates({"": run}, missing, workdir)
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
    parts = {"float/": run}
    for name, entry in comparison.entries.items():
      parts[f"{name}/"] = _with_config(run, entry.config)
    seeds = len(comparison.seeds)
    paragraphs += _estimates(parts, missing, workdir, seeds=seeds)
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


def _with_config(run, config):
  """A run like another, with its data and float network; it trains nothing."""
  other = copy.copy(run)
  other.config, other.bits = config, config.quant.bits
  other.weight, other.activation = quantizers(config.quant)
  return other


def _estimates(parts, missing, workdir, *, seeds=1):
  """What runs with the same data and float network take.

  Args:
    parts: run by the prefix of its stages' names.
    missing: the error of data that are not there, or None.
    workdir: directory of them all.
    seeds: how often all are repeated.
  """
  run = next(iter(parts.values()))
  network = _network(run)
  bits = sorted({b for part in parts.values() for b in part.bits}, reverse=True)
  stages = [
    (prefix, STAGES[name], part)
    for prefix, part in parts.items()
    for name in part.config.stages
  ]
  phases = [
    phase._replace(stage=f"{prefix}{phase.stage}")
    for prefix, stage, part in stages
    for phase in stage.phases(part)
  ]
  yield _layers(run, network)
  yield _sizes(network.table, bits)
  yield _memory(run, phases)
  speed = times.measure(run, network.table, network.macs)
  if missing is not None:
    yield times.of_examples(speed)
  else:
    works = [
      work._replace(stage=f"{prefix}{work.stage}")
      for prefix, stage, part in stages
      for work in stage.work(part, network.table)
    ]
    yield times.of_training(run, speed, phases, seeds=seeds)
    if works:
      yield times.of_work(run, speed, works, seeds=seeds)
  disk = seeds * sum(
    sum(pipeline.disk_bytes(part).values()) for part in parts.values()
  )
  yield (
    f"disk: at most {decimal(disk)} in {files.expand(workdir)}; nothing was "
    "written"
  )


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
    state, activations = memory(run, phase)
    parts = state.params, state.opt_state, (state.batch_stats, state.memory)
    sizes = [*map(tree.array_bytes, parts), activations]
    sizes.append(checkpoint_bytes(phase.recipe, state))
    rows.append((phase.stage, *map(decimal, sizes)))
  return (
    "memory of what is trained; activations that a step keeps for its "
    "backward pass on each device, at most: compiled steps take a third of it "
    "to all; and checkpoints on disk at most:\n"
    f"{aligned([_MEMORY, *rows])}"
  )


def _missing(run, missing):
  if missing is None:
    return
  unknown = "steps and times"
  if run is None:
    unknown = "the network, whose sizes they decide, steps and times"
  reason = prefixed("data", missing)
  yield f"data are missing, so {unknown} are unknown: {reason}"
