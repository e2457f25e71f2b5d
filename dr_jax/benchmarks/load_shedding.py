"""A burst of requests, served at the same bits or at fewer while it lasts.

  python -m dr_jax.benchmarks.load_shedding [--output=load_shedding.svg]
      [--model=resnet18] [--image-size=64] [--models=8] [--storage=50]

Several models share a memory that holds half of them at 8 bits. A request for
one that is not there, or at fewer bits, waits until the missing bit-planes are
read from storage; the least recently used models make room. Requests arrive at
random: slowly, then for a while faster than 8 bits can serve, then slowly
again. One worker serves them in order. First it always takes 8 bits; then a
policy of two rules looks at the queue before each request:

  more than `HIGH` requests wait                one bit-width down
  none has waited for `PATIENCE` requests       one bit-width up

Fewer bits must cost less, or there is nothing to shed. On a CPU a product takes
about as long at every bit-width; what falls with bits is what must be read and
held. Costs are measured first, and printed: bytes are those that `deploy.open`
reads, and its time, with verification and unpacking, is measured here, as is
that of one inference. Only the speed of the storage is assumed (`--storage`, in
MB/s; here files lie in the page cache). From these costs the queue is computed,
so that its times are of a clock that nothing else disturbs. Weights are random:
what fewer bits cost in accuracy is not shown.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from dr_jax import deploy
from dr_jax.benchmarks import network
from dr_jax.benchmarks.rows import Rows, prepared, turns
from dr_jax.pipeline.summary import environment
from dr_jax.report.figure import new_figure, save_figure
from dr_jax.runtime import command, compilation

FLAGS = flags.FLAGS


BITS = (8, 6, 4, 2)
# Requests, and how many of them arrive in the time that 8 bits take for one.
PHASES = {"before": (100, 0.5), "burst": (300, 1.5), "after": (200, 0.5)}
HIGH, PATIENCE = 3, 15


class Cost(NamedTuple):
  """What a model takes at one bit-width.

  Attributes:
    bytes: read from storage, and held in memory.
    open_seconds: to verify and unpack them.
  """

  bytes: int
  open_seconds: float


class Arrival(NamedTuple):
  """When a request arrives, and for which model."""

  seconds: float
  model: int


class Request(NamedTuple):
  """A request that was served; times in seconds from the start.

  Attributes:
    arrived, finished: when.
    bits: bit-width that it was served at.
    waiting: requests that waited behind it when it began.
    read_bytes: what was read from storage for it.
  """

  arrived: float
  finished: float
  bits: int
  waiting: int
  read_bytes: int


class Memory:
  """Models in a memory of limited size, each with the bits that were read.

  Attributes:
    held: {model: bits}, the least recently used first.
  """

  def __init__(self, costs: Mapping[int, Cost], size: int):
    self._costs, self._size = costs, size
    self.held: dict[int, int] = {}

  def take(self, model: int, bits: int) -> Cost:
    """Has a model at so many bits; returns what had to be read for it."""
    before = self.held.pop(model, None)
    self.held[model] = max(bits, before or 0)
    while sum(self._costs[b].bytes for b in self.held.values()) > self._size:
      del self.held[next(iter(self.held))]
    if before is None:
      return self._costs[bits]
    missing = self._costs[max(bits, before)]
    there = self._costs[before]
    return Cost(
      missing.bytes - there.bytes, missing.open_seconds - there.open_seconds
    )


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


class Server(NamedTuple):
  """Everything that the time of a request depends on.

  Attributes:
    costs: of a model, by bits.
    compute_seconds: of one inference.
    storage: bytes per second.
    models: how many there are.
  """

  costs: Mapping[int, Cost]
  compute_seconds: float
  storage: float
  models: int

  def memory(self) -> Memory:
    """An empty memory, for half of the models at the highest bits."""
    return Memory(self.costs, self.models * self.costs[max(BITS)].bytes // 2)

  def seconds(self, read: Cost) -> float:
    """Time of a request that has to read something first."""
    waited = read.bytes / self.storage + read.open_seconds
    return waited + self.compute_seconds

  def serve(
    self,
    arrivals: Mapping[str, Sequence[Arrival]],
    policy: Callable[[int], int],
  ) -> dict[str, list[Request]]:
    """Serves all requests in order, one at a time, by phase of arrival."""
    memory, now, number = self.memory(), 0.0, 0
    times = [a.seconds for phase in arrivals.values() for a in phase]
    found: dict[str, list[Request]] = {phase: [] for phase in arrivals}
    for phase, requests in arrivals.items():
      for arrived, model in requests:
        now, number = max(now, arrived), number + 1
        waiting = int(np.searchsorted(times, now, side="right")) - number
        bits = policy(waiting)
        read = memory.take(model, bits)
        now += self.seconds(read)
        found[phase].append(Request(arrived, now, bits, waiting, read.bytes))
    return found

  def arrivals(self, seed: int) -> dict[str, list[Arrival]]:
    """Random requests, a Poisson process, whose models are not equally popular.

    Its rates are multiples of what this server can do at the highest bits.
    """
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, self.models + 1)
    popularity /= popularity.sum()

    def models(count):
      return rng.choice(self.models, count, p=popularity).tolist()

    memory = self.memory()
    busy = [self.seconds(memory.take(m, max(BITS))) for m in models(1000)]
    found, start = {}, 0.0
    for phase, (count, rate) in PHASES.items():
      gaps = rng.exponential(statistics.mean(busy) / rate, count)
      times = (start + np.cumsum(gaps)).tolist()
      found[phase] = list(map(Arrival, times, models(count)))
      start = times[-1]
    return found


def define_flags() -> None:
  """Defines what the command takes; some names are also those of others."""
  flags.DEFINE_enum("model", "resnet18", network.NAMES, "Each model.")
  flags.DEFINE_integer(
    "image_size", 64, "Height and width of an image.", lower_bound=1
  )
  flags.DEFINE_integer("models", 8, "Number of models.", lower_bound=2)
  flags.DEFINE_float(
    "storage", 50.0, "MB/s at which storage is read.", lower_bound=0.001
  )
  flags.DEFINE_integer(
    "rounds", 7, "Times that each cost is measured.", lower_bound=1
  )
  flags.DEFINE_integer("seed", 0, "Of arrivals.")
  flags.DEFINE_string("output", "load_shedding.svg", "Figure to write.")
  flags.DEFINE_alias("image-size", "image_size")


def main():
  compilation.cache_on_disk()
  setting = network.Setting(FLAGS.model, FLAGS.image_size, bits=BITS)
  with tempfile.TemporaryDirectory() as folder:
    path = prepared(
      setting.model, lambda: setting.save(pathlib.Path(folder) / "model")
    )
    costs = open_costs(path, FLAGS.rounds)
    compute = compute_seconds(path, setting, FLAGS.rounds)
  server = Server(costs, compute, FLAGS.storage * 1e6, FLAGS.models)
  print_costs(server, setting)
  arrivals = server.arrivals(FLAGS.seed)
  runs = {
    "8 bits": server.serve(arrivals, lambda _: max(BITS)),
    "shedding": server.serve(arrivals, Shedding(BITS)),
  }
  try:
    save_figure(figure(runs), FLAGS.output)
  except ImportError as error:  # It says how to install matplotlib.
    raise ValueError(error) from None
  print_latencies(runs)
  print(environment())


def open_costs(path: pathlib.Path, rounds: int) -> dict[int, Cost]:
  """Opens an artifact at every bit-width, in turn; the shortest time counts."""
  seconds: dict[int, list[float]] = {b: [] for b in BITS}
  read = {}
  for _ in turns(rounds):
    for b in BITS:
      started = time.perf_counter()
      read[b] = deploy.open(path, b).read_bytes
      seconds[b].append(time.perf_counter() - started)
  return {b: Cost(read[b], min(seconds[b])) for b in BITS}


def compute_seconds(
  path: pathlib.Path, setting: network.Setting, rounds: int
) -> float:
  """The shortest time of one inference, which does not depend on bits."""
  x = setting.batch(1)["image"]
  served = deploy.Switchable(path, model=setting.floating(), sample=x)
  times = []
  for turn in range(rounds * len(BITS)):
    served.switch(BITS[turn % len(BITS)])
    started = time.perf_counter()
    jax.block_until_ready(served.predict(x))
    times.append(time.perf_counter() - started)
  return min(times)


def print_costs(server: Server, setting: network.Setting) -> None:
  """Prints what a model takes at each bit-width."""
  rows = Rows(
    f"{setting.model}, one image of {setting.size} pixels computes in "
    f"{1000 * server.compute_seconds:.1f} ms at every bit-width",
    (
      "bits",
      "MB",
      f"of {server.models} models fit",
      "open ms",
      f"read ms at {server.storage / 1e6:g} MB/s",
    ),
    left=0,
  )
  size = server.models * server.costs[max(BITS)].bytes // 2
  for b, cost in server.costs.items():
    rows.add(
      str(b),
      f"{cost.bytes / 1e6:.2f}",
      str(min(size // cost.bytes, server.models)),
      f"{1000 * cost.open_seconds:.1f}",
      f"{1000 * cost.bytes / server.storage:.1f}",
    )
  rows.end()


def print_latencies(runs: Mapping[str, Mapping[str, list[Request]]]) -> None:
  """Prints latencies by phase of arrival."""
  rows = Rows(
    "from arrival to answer",
    (
      *("served at", "arrived", "requests", "median ms", "99 % ms"),
      *("longest queue", "mean bits", "MB read per request"),
    ),
    left=2,
  )
  for name, phases in runs.items():
    for phase, requests in phases.items():
      latencies = [1000 * (r.finished - r.arrived) for r in requests]
      rows.add(
        name,
        phase,
        str(len(requests)),
        f"{np.median(latencies):.0f}",
        f"{np.percentile(latencies, 99):.0f}",
        str(max(r.waiting for r in requests)),
        f"{statistics.mean(r.bits for r in requests):.2f}",
        f"{statistics.mean(r.read_bytes for r in requests) / 1e6:.2f}",
      )
  rows.end()


def figure(runs: Mapping[str, Mapping[str, list[Request]]]):
  """Latency and bits by time of arrival; the burst is shaded."""
  drawn = new_figure(7.2, 4.2)
  latency, bits = drawn.subplots(
    2, 1, sharex=True, gridspec_kw={"height_ratios": (2, 1)}
  )
  for name, phases in runs.items():
    requests = [r for phase in phases.values() for r in phase]
    arrived = [r.arrived for r in requests]
    taken = [1000 * (r.finished - r.arrived) for r in requests]
    latency.plot(arrived, taken, linewidth=1, label=name)
    bits.step(arrived, [r.bits for r in requests], where="post", linewidth=1)
  burst = next(iter(runs.values()))["burst"]
  for axes in (latency, bits):
    axes.axvspan(burst[0].arrived, burst[-1].arrived, color="0.92", zorder=0)
    axes.grid(visible=True, color="0.85", linewidth=0.5)
  latency.set(yscale="log", ylabel="latency, ms")
  latency.legend(frameon=False)
  bits.set(xlabel="seconds", ylabel="bits", yticks=sorted(BITS))
  return drawn


if __name__ == "__main__":
  define_flags()
  command.start(main)
