"""A burst of requests, served at the same bits or at fewer while it lasts.

  python -m dr_jax.benchmarks.load_shedding [--output=load_shedding.svg]
      [--width=4096] [--depth=2]

Requests arrive at random: slowly, then for a while faster than 8 bits can
serve, then slowly again. One worker serves them in order, one at a time. First
it always computes with 8 bits; then a policy of two rules looks at the queue
before each request and switches:

  more than `HIGH` requests wait                one bit-width down
  none has waited for `PATIENCE` requests       one bit-width up

Fewer bits must cost less, or there is nothing to shed. Here they do: layers are
linear, with float inputs, one row at a time, and read the bit-planes of the
bit-width in use alone (backend "planes"). What a request takes at each
bit-width is measured first and printed, with that of float32 weights; rates of
arrival are multiples of what 8 bits take. Times are real, weights random: what
fewer bits cost in accuracy is not shown.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from rich.console import Console
from rich.table import Table

from dr_jax import deploy, nn, quant
from dr_jax.pipeline.summary import environment
from dr_jax.report.figure import new_figure, save_figure
from dr_jax.runtime import compilation

_WIDTH = flags.DEFINE_integer("width", 4096, "Of a layer.", lower_bound=1)
_DEPTH = flags.DEFINE_integer("depth", 2, "Number of layers.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "load_shedding.svg", "Figure to write.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the arrivals.")

BITS = (8, 6, 4, 2)
# Requests, and how many of them arrive in the time that 8 bits take for one.
PHASES = {"before": (60, 0.4), "burst": (400, 1.6), "after": (150, 0.4)}
HIGH, PATIENCE = 3, 15


class Request(NamedTuple):
  """One request that was served; times in seconds from the start.

  Attributes:
    arrived, finished: when.
    bits: bit-width that it was served at.
    waiting: requests that waited behind it when it began.
  """

  arrived: float
  finished: float
  bits: int
  waiting: int

  @property
  def latency(self) -> float:
    """Seconds from its arrival to its answer."""
    return self.finished - self.arrived


class Shedding:
  """The policy: fewer bits while requests wait, more when none has for long."""

  def __init__(self, bits: Sequence[int]):
    self._bits, self._position, self._idle = tuple(bits), 0, 0

  def __call__(self, waiting: int) -> int:
    """Returns the bits of the next request; `waiting` are behind it."""
    self._idle = 0 if waiting else self._idle + 1
    if waiting > HIGH:
      self._position = min(self._position + 1, len(self._bits) - 1)
    elif self._idle >= PATIENCE:
      self._position, self._idle = max(self._position - 1, 0), 0
    return self._bits[self._position]


def main(argv):
  del argv
  compilation.cache_on_disk()
  try:
    _main()
  except (ImportError, OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _main():
  model, x = network(_WIDTH.value, _DEPTH.value)
  served = switchable(model, x)
  costs = service_seconds(served, model, x)
  when = arrivals(costs["8 bits"], _SEED.value)
  runs = {}
  for name, policy in (("8 bits", lambda _: 8), ("shedding", Shedding(BITS))):
    runs[name] = serve(served, x, when, policy)
  save_figure(figure(runs), _OUTPUT.value)
  Console(width=120).print(
    cost_table(costs), latency_table(runs), environment()
  )


def network(width: int, depth: int) -> tuple[nnx.Module, np.ndarray]:
  """Random linear layers with a ReLU between them, and one row of inputs."""
  rngs = nnx.Rngs(0)
  layers: list = []
  for _ in range(depth):
    layers += [nnx.Linear(width, width, rngs=rngs), nnx.relu]
  x = np.random.default_rng(0).standard_normal((1, width), np.float32)
  return nnx.Sequential(*layers[:-1]), x


def switchable(model: nnx.Module, x: np.ndarray) -> deploy.Switchable:
  """The network with stored weights, which reads the planes of its bits."""
  quantized = nn.quantize(
    model,
    weight=quant.double_rounding(BITS, rounding="half_up"),
    sample=x,
    skip=(),
  )
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "model"
    deploy.save(path, quantized)
    return deploy.Switchable(path, model=model, backend="planes", sample=x)


def service_seconds(
  served: deploy.Switchable, model: nnx.Module, x: np.ndarray, rounds: int = 15
) -> dict[str, float]:
  """Median seconds of a request at each bit-width, and of float32 weights."""
  graph, state = nnx.split(model)
  plain = jax.jit(lambda state, x: nnx.merge(graph, state)(x))

  def at(bits):
    served.switch(bits)
    return served.predict(x)

  calls: dict[str, Callable[[], jax.Array]] = {
    f"{b} bits": lambda b=b: at(b) for b in served.candidates
  }
  calls["float32"] = lambda: plain(state, x)
  times: dict[str, list[float]] = {name: [] for name in calls}
  for turn in range(rounds + 1):
    for name, call in calls.items():
      started = time.perf_counter()
      jax.block_until_ready(call())
      if turn:  # The first may compile.
        times[name].append(time.perf_counter() - started)
  return {name: statistics.median(taken) for name, taken in times.items()}


def arrivals(seconds: float, seed: int) -> dict[str, np.ndarray]:
  """Times at which requests arrive, by phase.

  Args:
    seconds: what 8 bits take for a request.
    seed: of the random times between them (a Poisson process).
  """
  rng, start, found = np.random.default_rng(seed), 0.0, {}
  for phase, (count, rate) in PHASES.items():
    found[phase] = start + np.cumsum(rng.exponential(seconds / rate, count))
    start = found[phase][-1]
  return found


def serve(
  served: deploy.Switchable,
  x: np.ndarray,
  when: dict[str, np.ndarray],
  policy: Callable[[int], int],
  *,
  clock: Callable[[], float] = time.perf_counter,
  sleep: Callable[[float], None] = time.sleep,
) -> dict[str, list[Request]]:
  """Serves all requests in order, one at a time.

  Args:
    served: the network.
    x: inputs of every request.
    when: times of arrival by phase, from the start.
    policy: `policy(waiting) -> bits` of the next request.
    clock, sleep: seconds, and how to let them pass.

  Returns:
    What was served, by phase of arrival.
  """
  everyone = np.concatenate(list(when.values()))
  found: dict[str, list[Request]] = {phase: [] for phase in when}
  started, number = clock(), 0
  for phase, times in when.items():
    for arrived in times:
      early = arrived - (clock() - started)
      if early > 0:
        sleep(early)
      number += 1
      so_far = np.searchsorted(everyone, clock() - started, side="right")
      waiting = max(int(so_far) - number, 0)
      bits = policy(waiting)
      served.switch(bits)
      jax.block_until_ready(served.predict(x))
      finished = clock() - started
      found[phase].append(Request(float(arrived), finished, bits, waiting))
  return found


def cost_table(costs: dict[str, float]) -> Table:
  """What a request takes."""
  shown = Table(title="one request alone")
  shown.add_column("weights")
  for column in ("ms", "of 8 bits"):
    shown.add_column(column, justify="right")
  for name, seconds in costs.items():
    ratio = seconds / costs["8 bits"]
    shown.add_row(name, f"{1000 * seconds:.2f}", f"{ratio:.2f}")
  return shown


def latency_table(runs: dict[str, dict[str, list[Request]]]) -> Table:
  """Latencies by phase of arrival."""
  shown = Table(title="from arrival to answer")
  for column in ("served at", "arrived"):
    shown.add_column(column)
  for column in (
    *("requests", "median ms", "99 % ms", "longest queue", "mean bits"),
  ):
    shown.add_column(column, justify="right")
  for name, phases in runs.items():
    for phase, requests in phases.items():
      latencies = [1000 * request.latency for request in requests]
      shown.add_row(
        name,
        phase,
        str(len(requests)),
        f"{np.median(latencies):.1f}",
        f"{np.percentile(latencies, 99):.1f}",
        str(max(request.waiting for request in requests)),
        f"{statistics.mean(request.bits for request in requests):.2f}",
      )
  return shown


def figure(runs: dict[str, dict[str, list[Request]]]):
  """Latency and bits over time; the burst is shaded."""
  drawn = new_figure(7.2, 4.2)
  latency, bits = drawn.subplots(
    2, 1, sharex=True, gridspec_kw={"height_ratios": (2, 1)}
  )
  for name, phases in runs.items():
    requests = [r for phase in phases.values() for r in phase]
    arrived = [r.arrived for r in requests]
    latency.plot(arrived, [1000 * r.latency for r in requests], label=name)
    bits.step(arrived, [r.bits for r in requests], where="post")
  burst = next(iter(runs.values()))["burst"]
  for axes in (latency, bits):
    axes.axvspan(burst[0].arrived, burst[-1].arrived, color="0.92", zorder=0)
    axes.grid(visible=True, color="0.85", linewidth=0.5)
  latency.set(yscale="log", ylabel="latency, ms")
  latency.legend(frameon=False)
  bits.set(xlabel="seconds", ylabel="bits", yticks=sorted(BITS))
  return drawn


if __name__ == "__main__":
  app.run(main)
