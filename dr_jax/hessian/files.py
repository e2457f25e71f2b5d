"""Traces on disk, tied to the network that they are of.

A JSON file {"fingerprint": ..., "traces": {path: {"mean": ..., "stderr": ...,
"probes": ...}}}; floats come back in the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from dr_jax.hessian.trace import TraceEstimate
from dr_jax.runtime import files
from dr_jax.runtime.schema import COUNT

_SCHEMA = {
  "fingerprint": str,
  "traces": {...: {"mean": float, "stderr": float, "probes": COUNT}},
}


def save(
  path: str | os.PathLike,
  estimates: Mapping[str, TraceEstimate],
  *,
  fingerprint: str,
) -> None:
  """Writes traces to a JSON file, whole or not at all.

  Args:
    path: the file; replaced if it is there.
    estimates: from `trace`.
    fingerprint: `runtime.tree.fingerprint` of (params, batch_stats) of the
      network that they are of.

  Raises:
    ValueError: if an estimate is NaN or infinite.
  """
  traces = {name: e._asdict() for name, e in estimates.items()}
  content = {"fingerprint": fingerprint, "traces": traces}
  text = json.dumps(content, indent=1, allow_nan=False)
  files.write_text(path, text)


def load(
  path: str | os.PathLike, *, fingerprint: str | None = None
) -> dict[str, TraceEstimate]:
  """Reads traces that `save` wrote.

  Args:
    path: the file.
    fingerprint: of the network at hand; None takes traces of any.

  Returns:
    {slash path: estimate}.

  Raises:
    ValueError: if the file is damaged, or of another network.
    FileNotFoundError: if there is no file.
  """
  content = files.read_json(path, _SCHEMA)
  found = content["fingerprint"]
  estimates = {
    name: TraceEstimate(float(t["mean"]), float(t["stderr"]), t["probes"])
    for name, t in content["traces"].items()
  }
  if fingerprint is not None and fingerprint != found:
    raise ValueError(
      f"{path} must have traces of this network, {fingerprint[:12]}, got those "
      f"of {str(found)[:12]}"
    )
  return estimates
