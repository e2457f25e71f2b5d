"""The smallest mixed-precision job, and what it leaves in its directory."""

import json

from dr_jax.config import from_dict

BITS = (8, 4, 2)
STRATEGIES = ("hessian_ilp", "uniform", "greedy")
STAGES = (
  *("pretrain", "multi_precision", "hessian", "supernet", "search", "export"),
  "report",
)


def values(**changes):
  """The job as nested dicts; changes of groups are merged."""
  base = {
    "stages": STAGES,
    "data": {"holdout": 0.2},
    "model": {"name": "resnet", "options": {"depth": 8, "widths": (2, 3, 4)}},
    "quant": {"bits": BITS},
    "devices": {"data": 1},
    "pretrain": {"epochs": 2, "optimizer": "sgd", "learning_rate": 0.1},
    "train": {"epochs": 1, "vectorize": "sequential"},
    "hessian": {"images": 256, "batch_size": 128, "max_probes": 8},
    "supernet": {"epochs": 2, "vectorize": "sequential", "alrs": "eta"},
    "search": {"strategies": STRATEGIES, "budgets": (3.0, 5)},
  }
  for field, value in changes.items():
    if isinstance(value, dict) and field in base:
      value = {**base[field], **value}
    base[field] = value
  return base


def config(**changes):
  """The job as a configuration."""
  return from_dict(values(**changes))


def found(workdir):
  """The rows of the stage search."""
  return json.loads((workdir / "search" / "result.json").read_text())["rows"]


def trials_of(workdir, split="held_out"):
  """The file of assignments scored on a split."""
  (path,) = (workdir / "search").glob(f"trials_{split}_*.jsonl")
  return path
