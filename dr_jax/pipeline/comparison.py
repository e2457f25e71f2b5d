"""Comparisons: many methods from the same float network, data order and steps.

A comparison is a configuration with two more fields: `seeds`, and `methods`,
which maps names to the fields that are theirs (`method`, `quant`, `train`).
Entries with the same `row` share a row of the table, for methods that train one
network per bit-width. Every entry is a run in <workdir>/seed<n>/<name>;
finished ones are not repeated.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dr_jax import report
from dr_jax.config import Config, ConfigError, from_dict
from dr_jax.config.checks import check_fields, check_value
from dr_jax.config.fields import FILE_NAME, shown
from dr_jax.config.help import FieldHelp, field_help
from dr_jax.pipeline import pipeline
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.pretrain import float_network
from dr_jax.pipeline.summary import environment, write_page
from dr_jax.pipeline.workdir import Workdir
from dr_jax.runtime import files
from dr_jax.runtime.files import write_json, write_text

# Of the fields of a run, methods and stages are those of each entry.
FIELDS = (
  FieldHelp("seeds", "Every method runs once with each.", "integers >= 0"),
  *(f for f in field_help() if f.name not in ("method", "seed", "stages")),
  FieldHelp(
    "methods",
    "Methods by name: the row of the table, and fields of method, quant, train "
    "that are this method's.",
    "at least one",
  ),
)


class Entry(NamedTuple):
  """One method of a comparison: its row in the table, and its run."""

  row: str
  config: Config


class Comparison(NamedTuple):
  """The runs of a comparison.

  Attributes:
    base: the float run.
    entries: by name.
    seeds: every entry runs once per seed.
  """

  base: Config
  entries: dict[str, Entry]
  seeds: tuple[int, ...]


def from_values(values: Mapping[str, Any]) -> Comparison:
  """Builds a comparison; every method is checked before any is run.

  Raises:
    ConfigError: as `config.from_dict`, naming the method.
  """
  shared = dict(values)
  methods, seeds = shared.pop("methods"), shared.pop("seeds", (0,))
  base = from_dict({**shared, "stages": ("pretrain",)})
  if not isinstance(methods, Mapping) or not methods:
    raise ConfigError(
      f"methods must be {{name: fields}}, at least one, got {shown(methods)}"
    )
  if not _are_seeds(seeds):
    raise ConfigError(
      f"seeds must be different integers >= 0, got {shown(seeds)}"
    )
  for seed in seeds:
    check_fields(dataclasses.replace(base, seed=seed))
  entries = {
    name: _entry(name, given, shared) for name, given in methods.items()
  }
  taken = set()
  for name, (row, config) in entries.items():
    cells = {(row, b) for b in config.quant.bits}
    if cells & taken:
      raise ConfigError(
        f"methods.{name}: row {row!r} has one of its bit-widths already; use "
        "other bit-widths or another row"
      )
    taken |= cells
  return Comparison(base, entries, tuple(seeds))


def _entry(name, given, shared):
  """Builds and checks the entry of one method."""
  if not isinstance(name, str):
    raise ConfigError(f"methods must have names as keys, got {shown(name)}")
  where = f"methods.{name}"
  if not isinstance(given, Mapping):
    raise ConfigError(f"{where} must be a group of fields, got {shown(given)}")
  known = ("row", "method", "quant", "train")
  for field in given:
    if field not in known:
      raise ConfigError(
        f"{where}.{field} is not a field; it must be one of {', '.join(known)}"
      )
  row = given.get("row", name)
  for field, value in (("", name), (".row", row)):
    if not isinstance(value, str) or value == "float" or "/" in value:
      raise ConfigError(
        f"{where}{field} must be a name other than 'float', without slashes, "
        f"got {shown(value)}"
      )
    check_value(f"{where}{field}", value, {"pattern": FILE_NAME})
  fields = {key: value for key, value in given.items() if key != "row"}
  fields["stages"] = ("multi_precision", "export")
  try:
    return Entry(row, from_dict(_merged(shared, fields)))
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}") from None


def _are_seeds(seeds):
  if not isinstance(seeds, list | tuple) or not seeds:
    return False
  integers = all(type(seed) is int and seed >= 0 for seed in seeds)
  return integers and len(set(seeds)) == len(seeds)


def run(
  comparison: Comparison,
  workdir: str | os.PathLike,
  *,
  interrupted: Callable[[], str | None] = lambda: None,
) -> dict[str, Any]:
  """Runs all methods that are not done; writes compare.json and compare.md.

  Returns:
    What compare.json holds: {"task", "rows": {row: {"scores": {bits:
    {"accuracy", "loss": {"mean", "std", "seeds"}}}, "bytes_at": {bits: n},
    "tensor_bytes", "train_seconds"}}, "seeds", "environment"}.

  Raises:
    As `pipeline.run`.
  """
  workdir = files.expand(workdir)
  for seed, (name, entry) in itertools.product(
    comparison.seeds, comparison.entries.items()
  ):
    # Before hours of training, whether the last directory is another run's.
    config = dataclasses.replace(entry.config, seed=seed)
    Workdir(workdir / f"seed{seed}" / name).check(config, {})
  rows: dict[str, list[dict[str, Any]]] = {}
  for seed in comparison.seeds:
    directory = workdir / f"seed{seed}"
    config = dataclasses.replace(comparison.base, seed=seed)
    start, row = _float_run(config, directory / "float", interrupted)
    rows.setdefault("float", []).append(row)
    merged: dict[str, dict[str, Any]] = {}
    for name, entry in comparison.entries.items():
      stages = pipeline.run(
        dataclasses.replace(entry.config, seed=seed),
        directory / name,
        interrupted=interrupted,
        start=start,
      )["stages"]
      result = stages["export"] | {
        "train_seconds": stages["multi_precision"]["train_seconds"]
      }
      merged[entry.row] = _joined(merged.get(entry.row), result)
    for row, result in merged.items():
      rows.setdefault(row, []).append(result)
  results = {
    "task": rows["float"][0]["task"],
    "rows": {row: _statistics(seeds) for row, seeds in rows.items()},
    "seeds": comparison.seeds,
    "environment": environment(),
  }
  write_json(workdir / "compare.json", results)
  write_text(workdir / "compare.md", report.comparison_markdown(results))
  write_page(workdir)
  return results


def _float_run(config, workdir, interrupted):
  """The float network from which all methods start, and its row."""
  context = RunContext(config, workdir, interrupted)
  pipeline.check(context)
  with context.workdir.claim(config):
    network = float_network(context)
    size = context.float_bytes()
    row = context.workdir.finished("pretrain")
    row |= {"tensor_bytes": size, "bytes_at": {"float": size}}
    return network, row | {"task": context.data.task}


def _joined(before, result):
  """Joins runs of one row: all their bit-widths, the sum of their costs."""
  if before is None:
    return result
  joined = {key: before[key] | result[key] for key in ("scores", "bytes_at")}
  for key in ("tensor_bytes", "train_seconds"):
    joined[key] = before[key] + result[key]
  return joined


def _statistics(seeds):
  first = seeds[0]
  return {
    "scores": {
      bits: {
        kind: _spread([seed["scores"][bits][kind] for seed in seeds])
        for kind in ("accuracy", "loss")
      }
      for bits in first["scores"]
    },
    # Compressed weights differ from seed to seed.
    "bytes_at": {
      bits: round(statistics.mean(seed["bytes_at"][bits] for seed in seeds))
      for bits in first["bytes_at"]
    },
    "tensor_bytes": round(statistics.mean(s["tensor_bytes"] for s in seeds)),
    "train_seconds": statistics.mean(s["train_seconds"] for s in seeds),
  }


def _spread(values):
  std = statistics.stdev(values) if len(values) > 1 else 0.0
  return {"mean": statistics.mean(values), "std": std, "seeds": values}


def _merged(base, changes):
  merged = dict(base)
  for key, value in changes.items():
    if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
      value = _merged(merged[key], value)
    merged[key] = value
  return merged
