"""What a stage is: one value, from which everything else about it derives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx

from dr_jax.pipeline.context import RunContext


class Stage(NamedTuple):
  """One stage of a run.

  Attributes:
    name: what `stages` of a configuration calls it; its directory.
    help: what it does, in one line.
    run: does it.
    needs: stages that must come before it.
    network: trains or restores the network that later stages build on, or None
      if the stage has none.
    single_process: whether the first process does it alone, once all have the
      networks of the stages before it.
    check: raises ConfigError for what can be known before anything is written.
    disk_bytes: estimates the bytes that it will write at most; None for few.
    results: names of its results in the directory; None for its own name.
    is_done: whether there is nothing to do; None for: it has all its results.
  """

  name: str
  help: str
  run: Callable[[RunContext], object]
  needs: tuple[str, ...] = ()
  network: Callable[[RunContext], nnx.Module] | None = None
  single_process: bool = False
  check: Callable[[RunContext], None] = lambda run: None
  disk_bytes: Callable[[RunContext], int] | None = None
  results: Callable[[RunContext], tuple[str, ...]] | None = None
  is_done: Callable[[RunContext], bool] | None = None

  def result_names(self, run: RunContext) -> tuple[str, ...]:
    """Names under which the directory has results of this stage."""
    return (self.name,) if self.results is None else self.results(run)

  def done(self, run: RunContext) -> bool:
    """Whether nothing is left to do; every process must ask."""
    if self.is_done is not None:
      return self.is_done(run)
    names = self.result_names(run)
    return all(run.workdir.result(name) is not None for name in names)
