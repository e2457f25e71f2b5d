"""What JAX spends on programs: tracing, lowering, compiling."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from typing import NamedTuple

import jax

_PHASES = {
  "/jax/core/compile/jaxpr_trace_duration": "trace",
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
  "/jax/core/compile/backend_compile_duration": "compile",
}


class Compilations(NamedTuple):
  """CPU seconds, of all threads, of each program: traced, lowered, compiled."""

  trace: list[float]
  lower: list[float]
  compile: list[float]


@contextlib.contextmanager
def recorded() -> Iterator[Compilations]:
  """Records what JAX does to programs inside of the block.

  >>> with recorded() as compilations:
  ...   _ = jax.jit(lambda x: 2 * x + 1)(3.0)
  >>> len(compilations.compile)
  1
  """
  found, started = Compilations([], [], []), {}

  # JAX reports the time at which a phase starts, and what it took at its end.
  def starts(event: str, value: float, **_: str | int) -> None:
    started[event] = cpu_seconds()

  def ends(event: str, duration_secs: float, **_: str | int) -> None:
    if event in _PHASES:
      spent = cpu_seconds() - started[event]
      getattr(found, _PHASES[event]).append(spent)

  jax.monitoring.register_scalar_listener(starts)
  jax.monitoring.register_event_duration_secs_listener(ends)
  try:
    yield found
  finally:
    jax.monitoring.unregister_scalar_listener(starts)
    jax.monitoring.unregister_event_duration_listener(ends)


def cpu_seconds() -> float:
  """CPU seconds of this process so far, of all its threads."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime
