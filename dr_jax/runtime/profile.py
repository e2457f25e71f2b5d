"""A profile of some steps of training, for https://ui.perfetto.dev.

The same directory can be opened by XProf (`xprof --logdir=DIR`).
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dr_jax.runtime import command, processes

Step = Callable[[Any, Any], Any]

# Steps before the trace: the first ones compile.
_SKIP = 3


@contextlib.contextmanager
def profiled(
  step: Step, steps: int, directory: pathlib.Path, *, name: str, remaining: int
) -> Iterator[Step]:
  """Yields a step function of which some calls are traced; 0 for none.

  The devices are waited for before the first of them and after the last, so
  that the trace has these steps alone, and what the process does between them.
  Of several processes the first one traces, its own devices.

  Args:
    step: `step(state, batch)`; it is called as often as the caller likes.
    steps: how many calls to trace, from the fourth on. Where there will be
      fewer calls, earlier ones, and those that there are.
    directory: where the trace goes, in place of an earlier one.
    name: of what is traced, for the line that says where the trace is.
    remaining: how many calls there will be.
  """
  if not steps or not processes.is_first():
    yield step
    return
  trace = _Trace(step, steps, directory, name, remaining)
  try:
    yield trace
  finally:
    trace.stop()


class _Trace:
  """A step function, of which some calls are traced."""

  def __init__(self, step, steps, directory, name, remaining):
    self._step, self._directory, self._name = step, directory, name
    self._first = max(min(_SKIP, remaining - steps), 0)
    self._last = self._first + steps - 1
    self._calls, self._is_on = 0, False

  def __call__(self, state, batch):
    number = self._calls
    self._calls += 1
    if number == self._first:
      jax.block_until_ready((state, batch))
      self._start()
    if not self._is_on:
      return self._step(state, batch)
    with jax.profiler.StepTraceAnnotation("step", step_num=number):
      result = self._step(state, batch)
    if number == self._last:
      jax.block_until_ready(result)
      self.stop()
    return result

  def _start(self):
    shutil.rmtree(self._directory, ignore_errors=True)
    options = jax.profiler.ProfileOptions()
    # Calls of Python functions would be most of the trace, and slow it.
    options.python_tracer_level = 0
    jax.profiler.start_trace(
      self._directory, create_perfetto_trace=True, profiler_options=options
    )
    self._is_on = True

  def stop(self):
    """Ends the trace, if it is on, and says where it is."""
    if not self._is_on:
      return
    self._is_on = False
    jax.profiler.stop_trace()
    (made,) = self._directory.glob("plugins/profile/*/perfetto_trace.json.gz")
    path = made.rename(self._directory / made.name)
    count = self._calls - self._first
    command.say(
      f"{self._name}: profile of {count} steps in {path}; open it at "
      "https://ui.perfetto.dev"
    )
