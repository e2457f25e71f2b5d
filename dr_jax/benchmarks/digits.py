"""Accuracy on digits over several seeds: joint, separate LSQ, ALRS modes.

  python -m dr_jax.benchmarks.digits --workdir=DIR [--seeds=3]
      [--alrs=relative,none] [--config=configs/digits.py:432]
      [--config.train.optimizer=sgd ...]

Runs the configuration through the pipeline once per seed and ALRS mode, and
prints mean test accuracies. Finished runs in the directory are not repeated.
"""

from __future__ import annotations

import dataclasses
import os
import statistics

from absl import flags, logging
from ml_collections import config_flags

from dr_jax import pipeline
from dr_jax.benchmarks.rows import Rows, prepared
from dr_jax.config import from_dict
from dr_jax.runtime import command, compilation
from dr_jax.train import alrs

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where runs go.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.")
_MODES = flags.DEFINE_list("alrs", list(alrs.MODES), "ALRS modes.")
_SEPARATE = flags.DEFINE_bool("separate", True, "Also LSQ at each bit-width.")


def main():
  logging.set_verbosity(logging.WARNING)
  compilation.cache_on_disk()
  base = from_dict(_CONFIG.value.to_dict())
  bits = base.quant.bits
  rows: dict[str, list[list[float]]] = {}
  for seed in range(_SEEDS.value):
    for mode in _MODES.value:
      separate = _SEPARATE.value and mode == _MODES.value[0]
      stages = _run(base, seed, mode, separate=separate)["stages"]
      if mode == _MODES.value[0]:
        score = stages["pretrain"]["scores"]["float"]["accuracy"]
        rows.setdefault("float", []).append([score] * len(bits))
      if separate:
        alone = [_accuracy(stages[f"separate/{b}"], b) for b in bits]
        rows.setdefault("separate LSQ", []).append(alone)
      joint = [_accuracy(stages["multi_precision"], b) for b in bits]
      rows.setdefault(f"joint, alrs={mode}", []).append(joint)
  _print(base.name, bits, rows)
  print(pipeline.environment())


def _run(base, seed, mode, *, separate):
  config = dataclasses.replace(
    base,
    seed=seed,
    stages=("pretrain", "multi_precision") + ("separate",) * separate,
    train=dataclasses.replace(base.train, alrs=mode),
  )
  name = f"{base.name}-seed{seed}-{mode}"
  return prepared(
    name, lambda: pipeline.run(config, os.path.join(_WORKDIR.value, name))
  )


def _accuracy(result, bits):
  return result["scores"][str(bits)]["accuracy"]


def _print(name, bits, rows):
  table = Rows(
    f"{name}: test accuracy, mean (minimum) of {_SEEDS.value} seeds",
    ("run", *(f"{b} bits" for b in bits)),
  )
  for run, seeds in rows.items():
    columns = zip(*seeds, strict=True)
    cells = (f"{statistics.mean(c):.2f} ({min(c):.2f})" for c in columns)
    table.add(run, *cells)
  table.end()


if __name__ == "__main__":
  command.start(main)
