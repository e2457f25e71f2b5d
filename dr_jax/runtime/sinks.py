"""Where numbers go besides metrics.jsonl: TensorBoard, Weights & Biases.

A sink is any object with the three methods of `Sink`; `pipeline.run` takes
them. Nothing is opened before the first number, and packages are loaded then.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dr_jax.runtime import files


class Sink(Protocol):
  """Takes the numbers of a run; see `runtime.metrics` for the arguments."""

  def write(
    self,
    stage: str,
    step: int,
    values: Mapping[str, float],
    *,
    bits: int | str | None,
  ) -> None:
    """Takes {name: number} of a step."""
    ...

  def resume(self, stage: str, step: int) -> None:
    """Is told that a stage begins, or resumes, after `step`."""
    ...

  def close(self) -> None:
    """Ends the run."""
    ...


class TensorBoard:
  """Event files below DIR/tensorboard, a run for each stage.

  Charts are `name` or, of each bit-width, `name/bits`. Of a stage that resumes,
  TensorBoard hides what it will write again.
  """

  package, extra = "tensorboardX", "tensorboard"

  def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any]):
    """Opens nothing; `config` is not used."""
    del config
    self._directory = workdir / "tensorboard"
    self._writers: dict[str, Any] = {}
    self._steps: dict[str, int] = {}

  def write(self, stage, step, values, *, bits):
    writer = self._writers.get(stage) or self._open(stage)
    for name, value in values.items():
      tag = name if bits is None else f"{name}/{bits}"
      writer.add_scalar(tag, value, step)
    writer.flush()

  def resume(self, stage, step):
    if stage in self._writers:
      self._writers.pop(stage).close()
    self._steps[stage] = step

  def close(self):
    for writer in self._writers.values():
      writer.close()
    self._writers.clear()

  def _open(self, stage):
    import tensorboardX

    start = self._steps.get(stage, 0)
    writer = tensorboardX.SummaryWriter(
      os.fspath(self._directory / stage),
      # The first step that is written again.
      purge_step=start + 1,
      # By default, what begins in the same second has the same name.
      filename_suffix=f".{os.getpid()}.{start}",
    )
    self._writers[stage] = writer
    return writer


class WandB:
  """A run of Weights & Biases, in DIR/wandb.

  Numbers are `stage/name` or, of each bit-width, `stage/name/bits`, each
  against `stage/step`. A run that resumes has the same id (DIR/wandb-run-id).
  Variables of wandb hold: WANDB_PROJECT ("dr_jax" without it),
  WANDB_MODE=offline, WANDB_SILENT.
  """

  package, extra = "wandb", "wandb"

  def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any]):
    """Opens nothing.

    Args:
      workdir: directory of the run.
      config: what the run is listed with; its name among them.
    """
    self._workdir, self._config = workdir, dict(config)
    self._run: Any = None
    self._stages: set[str] = set()

  def write(self, stage, step, values, *, bits):
    run = self._run = self._run or self._open()
    if stage not in self._stages:
      self._stages.add(stage)
      run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    suffix = "" if bits is None else f"/{bits}"
    named = {f"{stage}/{name}{suffix}": v for name, v in values.items()}
    run.log({f"{stage}/step": step, **named})

  def resume(self, stage, step):
    del stage, step  # What was logged stays.

  def close(self):
    if self._run is not None:
      self._run.finish()
      self._run = None

  def _open(self):
    import wandb

    path = self._workdir / "wandb-run-id"
    if not path.exists():
      files.write_text(path, secrets.token_hex(4))
    try:
      return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "dr_jax"),
        name=self._config.get("name"),
        id=path.read_text(encoding="utf-8").strip(),
        resume="allow",
        config=self._config,
        dir=self._workdir,
      )
    # What its variables say can be wrong in many ways.
    except (wandb.Error, ValueError) as error:
      raise ValueError(f"log_to=wandb: {error}") from error


SINKS = {
  "tensorboard": TensorBoard,
  "wandb": WandB,
}


def make(
  names: Sequence[str], workdir: str | os.PathLike, config: Mapping[str, Any]
) -> list[Sink]:
  """Returns sinks by their names.

  Args:
    names: of SINKS.
    workdir: directory of the run.
    config: its configuration.

  Raises:
    ValueError: for another name, or a package that is not installed.
  """
  for name in names:
    if name not in SINKS:
      raise ValueError(f"log_to must be of {', '.join(SINKS)}, got {name!r}")
    package, extra = SINKS[name].package, SINKS[name].extra
    if importlib.util.find_spec(package) is None:
      raise ValueError(
        f"log_to={name} needs {package}: pip install 'dr_jax[{extra}]'"
      )
  path = files.expand(workdir)
  return [SINKS[name](path, config) for name in dict.fromkeys(names)]
