"""Accuracy on digits over several seeds: joint, separate LSQ, ALRS modes.

  python -m dr_jax.benchmarks.digits --workdir=DIR [--seeds=3] [--bits=4,3,2]

Runs `configs/digits.py` through the pipeline once per seed and ALRS mode, and
prints mean test accuracies. Finished runs in the directory are not repeated.
"""

from __future__ import annotations

import dataclasses
import os
import statistics

from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from dr_jax import pipeline
from dr_jax.config import Config, from_dict
from dr_jax.train import alrs

_CONFIG = flags.DEFINE_string("config", "configs/digits.py", "Base job.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where runs go.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.")
_MODES = flags.DEFINE_list("alrs", list(alrs.MODES), "ALRS modes.")
_BITS = flags.DEFINE_list("bits", ["8", "6", "4", "2"], "Candidate bit-widths.")


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  base = _base()
  bits = base.quant.bits
  rows: dict[str, list[list[float]]] = {}
  for seed in range(_SEEDS.value):
    for mode in _MODES.value:
      first = mode == _MODES.value[0]
      summary = _run(base, seed, mode, separate=first)
      stages = summary["stages"]
      if first:
        score = stages["pretrain"]["scores"]["float"]["accuracy"]
        rows.setdefault("float", []).append([score] * len(bits))
        alone = [_accuracy(stages[f"separate/{b}"], b) for b in bits]
        rows.setdefault("separate LSQ", []).append(alone)
      joint = [_accuracy(stages["multi_precision"], b) for b in bits]
      rows.setdefault(f"joint, alrs={mode}", []).append(joint)
  table = Table(
    title=f"{base.name}: mean test accuracy of {_SEEDS.value} seeds"
  )
  table.add_column("run")
  for b in bits:
    table.add_column(f"{b} bits", justify="right")
  for name, seeds in rows.items():
    columns = zip(*seeds, strict=True)
    table.add_row(name, *(f"{statistics.mean(c):.2f}" for c in columns))
  console = Console(width=100)
  console.print(table)
  console.print(pipeline.environment())


def _base() -> Config:
  scope: dict = {}
  with open(_CONFIG.value) as file:
    exec(compile(file.read(), _CONFIG.value, "exec"), scope)
  values = scope["get_config"]().to_dict()
  values["quant"]["bits"] = tuple(map(int, _BITS.value))
  return from_dict(values)


def _run(base, seed, mode, *, separate):
  stages = ("pretrain", "multi_precision") + ("separate",) * separate
  config = dataclasses.replace(
    base,
    seed=seed,
    stages=stages,
    train=dataclasses.replace(base.train, alrs=mode),
  )
  name = "".join(map(str, config.quant.bits))
  workdir = os.path.join(_WORKDIR.value, f"{name}-seed{seed}-{mode}")
  return pipeline.run(config, workdir)


def _accuracy(result, bits):
  return result["scores"][str(bits)]["accuracy"]


if __name__ == "__main__":
  app.run(main)
