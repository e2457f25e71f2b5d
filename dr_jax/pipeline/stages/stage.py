"""A stage: one value, from which everything else about it is derived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flax import nnx

from dr_jax.nn import LayerTable
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.phases import Phase
from dr_jax.pipeline.work import Work


def no_phases(run: RunContext) -> tuple[Phase, ...]:
  """Of a stage that trains nothing."""
  del run
  return ()


def no_work(run: RunContext, table: LayerTable) -> tuple[Work, ...]:
  """Of a stage that computes little besides training."""
  del run, table
  return ()


class Stage(NamedTuple):
  """One stage of a run.

  Attributes:
    name: its name in `stages` of a configuration, and its directory.
    help: one line for `--help`.
    run: runs it, to the end or until a signal.
    needs: stages that must come before it.
    network: trains or restores the network that later stages build on; None if
      there is none.
    single_process: whether the first process runs it alone, once all processes
      have the networks of the stages before it.
    check: raises ConfigError for what is wrong before anything is written.
    disk_bytes: returns the bytes that it writes at most; None if negligible.
    phases: returns what it trains, before it does.
    work: returns what else it computes that takes a while, before it does; the
      table is that of the layers that are quantized.
    results: returns the names of its results; None if that is its own name.
    is_done: returns whether nothing is left to do; None if that is whenever
      all its results exist.
  """

  name: str
  help: str
  run: Callable[[RunContext], object]
  needs: tuple[str, ...] = ()
  network: Callable[[RunContext], nnx.Module] | None = None
  single_process: bool = False
  check: Callable[[RunContext], None] = lambda run: None
  disk_bytes: Callable[[RunContext], int] | None = None
  phases: Callable[[RunContext], Sequence[Phase]] = no_phases
  work: Callable[[RunContext, LayerTable], Sequence[Work]] = no_work
  results: Callable[[RunContext], tuple[str, ...]] | None = None
  is_done: Callable[[RunContext], bool] | None = None

  def result_names(self, run: RunContext) -> tuple[str, ...]:
    """Returns the names of this stage's results in the directory."""
    return (self.name,) if self.results is None else self.results(run)

  def done(self, run: RunContext) -> bool:
    """Returns whether nothing is left to do; all processes must call this."""
    if self.is_done is not None:
      return self.is_done(run)
    names = self.result_names(run)
    return all(run.workdir.result(name) is not None for name in names)
