"""What the result.json of each stage holds, for whoever reads it.

A directory can come from someone else, and a disk can fail: a result is checked
when it is read, at the start of a run and not after its training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dr_jax import search
from dr_jax.runtime.schema import COUNT, NUMBER, Where

PERCENT = Where(
  NUMBER, lambda x: not (x < 0 or x > 100), "a number >= 0 and <= 100"
)
SCORE = {"accuracy": PERCENT, "loss": NUMBER}
SIZE = Where(COUNT, bool, "an integer > 0 and < 2^63")
ALLOCATION = {...: COUNT}
TRAINED = {"scores": SCORE, "train_seconds": NUMBER, ...: object}
# What a search found under one budget: also a file in search/found.
ROW = {
  # A part of the names of files.
  "strategy": Where(
    str, search.SEARCHES.__contains__, f"one of {', '.join(search.SEARCHES)}"
  ),
  "budget": float,
  "allocation": ALLOCATION,
  "cost": {"stored_bits": COUNT, "bops": COUNT, ...: COUNT},
  "eval": SCORE,
  "test": SCORE,
  "evaluations": COUNT,
  "seconds": float,
  "evaluation_seconds": float,
  ...: object,
}
# Values of `scores` and `bytes_at` are given by label.
_SCHEMAS: dict[str, Any] = {
  "pretrain": TRAINED,
  "multi_precision": TRAINED,
  "separate": TRAINED,
  "supernet": TRAINED | {"network": str},
  "hessian": {
    "traces": {...: {"mean": float, "stderr": float, "probes": COUNT}},
    ...: object,
  },
  "search": {"request": object, "rows": [ROW], ...: object},
  "export": {
    "scores": SCORE,
    "bytes_at": COUNT,
    "stored_bytes": COUNT,
    "tensor_bytes": COUNT,
    "float_bytes": SIZE,
    ...: object,
  },
}


def schema_of(name: str, bits: Iterable[int] = ()) -> Any:
  """The schema of a result.

  Args:
    name: of the result: of a stage, or as separate/8.
    bits: bit-widths of the run, all of which the result must have.

  >>> sorted(map(str, schema_of("multi_precision", (8, 4))["scores"]))
  ['4', '8', 'Ellipsis']
  """
  stage, _, alone = name.partition("/")
  labels = ["float"] if stage == "pretrain" else list(map(str, bits))
  labels = [alone] if alone else labels
  schema = dict(_SCHEMAS.get(stage, {...: object}))
  for key in {"scores", "bytes_at"} & set(schema):
    schema[key] = dict.fromkeys([*labels, ...], schema[key])
  return schema


def last_network(stages: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the result of a run's last network of several bit-widths, if any.

  Args:
    stages: results by the names of their stages.

  >>> last_network({"pretrain": {"seconds": 5}, "export": {"seconds": 2}})
  {'seconds': 2}
  """
  names = ("export", "supernet", "multi_precision")
  return next((stages[name] for name in names if name in stages), None)
