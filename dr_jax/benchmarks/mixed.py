"""Mixed precision over several seeds: SuperNet, and every search by budget.

  python -m dr_jax.benchmarks.mixed --workdir=DIR [--seeds=3]
      [--config=configs/digits_mixed.py] [--config.search.metric=accuracy ...]

Runs the configuration through the pipeline once per seed, and prints test
accuracy and cross-entropy as mean and standard error over seeds. Finished runs
in the directory are not repeated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import statistics
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

from dr_jax import pipeline, report
from dr_jax.benchmarks.rows import Rows, prepared
from dr_jax.config import from_dict
from dr_jax.runtime import command, compilation

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits_mixed.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where runs go.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.")

_BASELINES = ("uniform", "random")


def main():
  logging.set_verbosity(logging.WARNING)
  compilation.cache_on_disk()
  base = from_dict(_CONFIG.value.to_dict())
  runs = []
  for seed in range(_SEEDS.value):
    config = dataclasses.replace(base, seed=seed)
    name = f"{base.name}-seed{seed}"
    workdir = os.path.join(_WORKDIR.value, name)
    summary = prepared(name, functools.partial(pipeline.run, config, workdir))
    runs.append(summary["stages"])
  _print_uniform(base.quant.bits, runs)
  rows = [run["search"]["rows"] for run in runs]
  _print_searches(rows)
  _print_baselines(rows)
  print(pipeline.environment())


def _print_uniform(bits, runs):
  """The SuperNet at one bit-width everywhere, and the network it came from."""
  columns = ("multi-precision %", "SuperNet %", "difference")
  table = Rows(
    "uniform bits: multi-precision network and SuperNet",
    ("bits", *columns, "multi-precision loss", "SuperNet loss"),
  )
  for b in bits:
    scores = {
      stage: [run[stage]["scores"][str(b)] for run in runs]
      for stage in ("multi_precision", "supernet")
    }
    before, after = ([s["accuracy"] for s in scores[stage]] for stage in scores)
    losses = ([s["loss"] for s in scores[stage]] for stage in scores)
    table.add(
      str(b),
      _mean(before),
      _mean(after),
      _difference(after, before),
      *(_mean(values, 4) for values in losses),
    )
  table.end()


def _print_searches(seeds):
  """What every search found at every budget."""
  table = Rows(
    f"searches, {len(seeds)} seeds, test set",
    ("budget", "search", "accuracy %", *report.COLUMNS, "eval loss"),
    left=2,
  )
  for rows in zip(*seeds, strict=True):

    def mean(value, rows=rows):
      return statistics.mean(value(row) for row in rows)

    table.add(
      f"{rows[0]['budget']:g}",
      rows[0]["strategy"],
      _mean([row["test"]["accuracy"] for row in rows]),
      _mean([row["test"]["loss"] for row in rows], 4),
      f"{mean(lambda row: row['cost']['stored_bits'] / 8):,.0f}",
      f"{mean(lambda row: row['cost']['bops'] / 1e6):.2f}",
      f"{mean(lambda row: row['evaluations']):.0f}",
      f"{mean(lambda row: row['seconds']):.2f}",
      f"{mean(lambda row: row['evaluation_seconds']):.2f}",
      f"{mean(lambda row: row['eval']['loss']):.4f}",
    )
  table.end()


def _print_baselines(seeds):
  """hessian_ilp against the baselines, seed by seed."""
  names = ("accuracy", "cross-entropy")
  table = Rows(
    "hessian_ilp less a baseline, paired by seed",
    (
      "budget",
      *(f"{name}, {baseline}" for baseline in _BASELINES for name in names),
      *(f"{name} within one s.e." for name in names),
    ),
  )
  found: dict[tuple[str, float], list] = {}
  for row in (row for rows in seeds for row in rows):
    found.setdefault((row["strategy"], row["budget"]), []).append(row["test"])
  for budget in dict.fromkeys(budget for _, budget in found):
    ours = found.get(("hessian_ilp", budget))
    baselines = [
      found[baseline, budget]
      for baseline in _BASELINES
      if (baseline, budget) in found
    ]
    if ours is None or len(baselines) < len(_BASELINES):
      continue
    cells, holds = [], {"accuracy": True, "loss": True}
    for theirs in baselines:
      for name, digits in (("accuracy", 2), ("loss", 4)):
        mine, other = ([s[name] for s in side] for side in (ours, theirs))
        cells.append(_difference(mine, other, digits))
        sign = 1 if name == "accuracy" else -1
        gaps = [sign * (a - b) for a, b in zip(mine, other, strict=True)]
        holds[name] &= statistics.mean(gaps) >= -_stderr(gaps)
    table.add(
      f"{budget:g}",
      *cells,
      *("yes" if held else "no" for held in holds.values()),
    )
  table.end()


def _mean(values: Sequence[float], digits: int = 2) -> str:
  return f"{statistics.mean(values):.{digits}f} ± {_stderr(values):.{digits}f}"


def _difference(a, b, digits=2):
  gaps = [x - y for x, y in zip(a, b, strict=True)]
  return f"{statistics.mean(gaps):+.{digits}f} ± {_stderr(gaps):.{digits}f}"


def _stderr(values):
  if len(values) < 2:
    return math.nan
  return statistics.stdev(values) / math.sqrt(len(values))


if __name__ == "__main__":
  command.start(main)
