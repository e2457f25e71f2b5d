"""Scores of a network as it is deployed, and the result of a stage."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from flax import nnx

from dr_jax import nn, train
from dr_jax.pipeline import validation
from dr_jax.pipeline.context import RunContext
from dr_jax.runtime import processes
from dr_jax.runtime.metrics import MetricsWriter
from dr_jax.train import loop

Scores = dict[str, dict[str, float]]


def as_deployed(run: RunContext, model: nnx.Module) -> nnx.Module:
  """Returns a quantized network in its deployed form, a float one as it is.

  Folding norms before the program instead of inside it changes last bits,
  which rounding to codes can amplify: what is scored is what will be served.
  """
  if not nn.layer_table(model):
    return model
  return nn.deployed.assemble(run.model(), nn.deployed.parts_of(model))


def scores(
  run: RunContext,
  model: nnx.Module,
  bits: Sequence[Any],
  *,
  indices: Sequence[Any] | None = None,
) -> Scores:
  """Scores a network on the test set.

  Args:
    run: the run.
    model: float, or in its deployed form.
    bits: bit-widths or other labels, one per score; None for a float network.
    indices: the assignments that `bits` label; by default positions.

  Returns:
    {label: {"accuracy": percent, "loss": cross-entropy}}.
  """
  network = nn.functional(model)
  evaluate = train.make_evaluate(network, run.local)
  found = {}
  for index, b in zip(indices or range(len(bits)), bits, strict=True):
    batches = run.epoch(run.data.test)
    score = evaluate(network.params, network.batch_stats, index, batches)
    found["float" if b is None else str(b)] = score._asdict()
  return found


def finish_stage(
  run: RunContext,
  stage: str,
  model: nnx.Module,
  bits: Sequence[Any],
  *,
  steps: int,
  started: float,
  **result: Any,
) -> None:
  """Scores a trained network and writes its stage's result, unless it exists.

  Args:
    run: the run.
    stage: its name.
    model: the trained network.
    bits: its candidate bit-widths, (None,) for a float network.
    steps: steps of training.
    started: time.monotonic() at the start of the stage.
    **result: what the stage's result holds besides scores and seconds.
  """
  if run.workdir.result(stage) is not None:
    return

  def finish():
    found = scores(run, as_deployed(run, model), bits)
    try:
      seconds = _log_scores(run, stage, found, steps)
    except (OSError, ValueError) as error:
      # The network is trained: a damaged log is no reason to fail.
      warnings.warn(str(error), stacklevel=2)
      seconds = math.nan
    run.workdir.finish(
      stage,
      started,
      scores=found,
      train_seconds=round(seconds, 1),
      **result,
    )

  processes.on_first(finish)


def _log_scores(run, stage, found, steps):
  """Writes scores to the metrics; returns the seconds of training."""
  with MetricsWriter(run.workdir.metrics, run.sinks) as metrics:
    # A process that was killed here has written some of them already.
    metrics.resume(stage, steps, names=(*loop.NAMES, *validation.NAMES))
    for key, score in found.items():
      named = {f"test_{name}": value for name, value in score.items()}
      bits_or_none = None if key == "float" else int(key)
      metrics.write(stage, steps, named, bits=bits_or_none)
    return metrics.training_seconds(
      stage, examples_per_step=run.config.data.batch_size
    )
