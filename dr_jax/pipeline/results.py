"""What the result.json of each stage holds, for whoever reads it.

A directory can come from someone else, and a disk can fail: a result is checked
when it is read, at the start of a run and not after its training.
"""

from __future__ import annotations

from typing import Any

from dr_jax.runtime.schema import COUNT, NUMBER

SCORE = {"accuracy": NUMBER, "loss": NUMBER}
SCORES = {...: SCORE}
BYTES = {...: COUNT}
ALLOCATION = {...: COUNT}
TRAINED = {"scores": SCORES, "train_seconds": NUMBER, ...: object}
# What a search found under one budget: also a file in search/found.
ROW = {
  "strategy": str,
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
_SCHEMAS: dict[str, Any] = {
  "pretrain": TRAINED,
  "multi_precision": TRAINED,
  "separate": TRAINED,
  "supernet": TRAINED | {"network": str},
  "hessian": {"traces": {...: object}, ...: object},
  "search": {"request": object, "rows": [ROW], ...: object},
  "export": {
    "scores": SCORES,
    "bytes_at": BYTES,
    "stored_bytes": COUNT,
    "tensor_bytes": COUNT,
    "float_bytes": COUNT,
    ...: object,
  },
}


def schema_of(stage: str) -> Any:
  """The schema of a stage's result, by the name of the result.

  >>> schema_of("separate/8") is schema_of("pretrain")
  True
  """
  return _SCHEMAS.get(stage.split("/")[0], {...: object})
