"""A run: the stages that a configuration names, in order.

Each stage resumes where it was stopped, and is skipped when done. `stages`
defines them and what each needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from dr_jax.config import Config, ConfigError
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages import STAGES, Stage
from dr_jax.pipeline.summary import summarize
from dr_jax.runtime import processes
from dr_jax.runtime.sinks import Sink


def run(
  config: Config,
  workdir: str | os.PathLike,
  *,
  interrupted: Callable[[], str | None] = lambda: None,
  start: nnx.Module | None = None,
  profile: int = 0,
  sinks: Sequence[Sink] = (),
) -> dict[str, Any]:
  """Runs the stages that a configuration names, in order.

  Args:
    config: the configuration.
    workdir: directory of the run, which resumes there.
    interrupted: returns the name of a signal that asks to stop, else None.
    start: a trained float network that replaces the stage pretrain.
    profile: how many steps to profile of each stage that trains, as far as it
      still has steps to do: `<workdir>/profile/<stage>/perfetto_trace.json.gz`.
    sinks: where the numbers in metrics.jsonl go as well; the caller closes
      them.

  Returns:
    The summary: what summary.json holds.

  Raises:
    ConfigError: if the configuration does not fit the data, or the directory
      belongs to another configuration, cannot be written to, or has too little
      room. Nothing is overwritten then.
    CheckpointError: if a state cannot be saved or restored.
    ValueError: from the library, for values that only it can check.
    train.NonFiniteError, train.InterruptedRun: see `train.Loop`.
  """
  check_stages(config)
  context = RunContext(
    config,
    workdir,
    interrupted,
    start=start,
    profile=profile,
    sinks=sinks,
  )
  check(context)
  with context.workdir.claim(config):
    for stage in _stages(config):
      # A damaged result ends the run now, and not after its training.
      for name in stage.result_names(context):
        context.workdir.result(name)
    for stage in _stages(config):
      run_stage(context, stage)
      for name in stage.result_names(context):
        # None if a network was given in place of the stage.
        if (result := context.workdir.result(name)) is not None:
          context.results[name] = result
    return summarize(context)


def _stages(config):
  return [STAGES[name] for name in config.stages]


def check_stages(config: Config) -> None:
  """Checks names and order of the stages.

  Raises:
    ConfigError: for an unknown stage, or one that comes before what it needs.
  """
  for position, name in enumerate(config.stages):
    if name not in STAGES:
      raise ConfigError(f"stages must be of {', '.join(STAGES)}, got {name!r}")
    for needed in STAGES[name].needs:
      if needed == "pretrain" and config.model.weights:
        continue
      if needed not in config.stages[:position]:
        raise ConfigError(f"stages: {name} must come after {needed}")


def check(context: RunContext) -> None:
  """Checks the configuration against files, model and disk; writes nothing.

  Raises:
    ConfigError: if the model's weights cannot be read or do not fit it, for
      what a stage cannot do, if the directory belongs to another configuration,
      or if its disk has too little room.
  """
  if context.config.model.weights:
    context.untrained()
  for stage in _stages(context.config):
    stage.check(context)
  context.workdir.check(context.config, disk_bytes(context))


def disk_bytes(context: RunContext) -> dict[str, int]:
  """Returns what the checkpoints of each stage, and the artifact, may take."""
  return {
    stage.name: stage.disk_bytes(context)
    for stage in _stages(context.config)
    if stage.disk_bytes is not None
  }


def run_stage(context: RunContext, stage: Stage) -> None:
  """Runs one stage unless it is done; all processes must call this."""
  if not stage.single_process:
    if not stage.done(context):
      stage.run(context)
    return
  if jax.process_count() > 1:
    # Networks are trained and restored by all processes together.
    names = context.config.stages
    for name in names[: names.index(stage.name)]:
      if (network := STAGES[name].network) is not None:
        network(context)

  def alone():
    if not stage.done(context):
      stage.run(context)

  processes.on_first(alone)
