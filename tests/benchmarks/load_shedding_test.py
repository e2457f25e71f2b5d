"""Tests of the burst of requests; measured times are not tested."""

import numpy as np
import pytest
from tables import cells, printed

from dr_jax import deploy
from dr_jax.benchmarks import load_shedding, network
from dr_jax.benchmarks.load_shedding import (
  BITS,
  HIGH,
  PATIENCE,
  Arrival,
  Cost,
  Memory,
  Server,
  Shedding,
)

COSTS = {b: Cost(100 * b, 0.001 * b) for b in BITS}
SERVER = Server(COSTS, compute_seconds=0.01, storage=10_000.0, models=8)


def test_bits_drop_while_requests_wait_and_rise_when_none_has_for_long():
  policy = Shedding((8, 4, 2))
  assert [policy(HIGH), policy(HIGH + 1)] == [8, 4]
  assert [policy(HIGH + 1), policy(HIGH + 1)] == [2, 2]
  assert [policy(0) for _ in range(PATIENCE)] == [2] * (PATIENCE - 1) + [4]
  # One that waits begins the count again.
  assert [policy(0) for _ in range(PATIENCE - 1)] == [4] * (PATIENCE - 1)
  assert policy(1) == 4
  assert [policy(0) for _ in range(PATIENCE)][-1] == 8
  assert [policy(0) for _ in range(PATIENCE)][-1] == 8


def test_memory_reads_what_is_missing_and_lets_the_oldest_go():
  memory = Memory(COSTS, size=1600)
  assert memory.take(0, 8) == COSTS[8]
  assert memory.take(0, 2) == Cost(0, 0)
  assert memory.take(1, 2) == COSTS[2]
  read = memory.take(1, 6)
  assert (read.bytes, read.open_seconds) == (400, pytest.approx(0.004))
  assert memory.held == {0: 8, 1: 6}
  memory.take(0, 8)
  memory.take(2, 4)
  assert memory.held == {0: 8, 2: 4}


def test_requests_are_served_in_order_and_count_those_behind_them():
  arrivals = {
    "a": [Arrival(0.0, 0), Arrival(0.05, 0), Arrival(0.06, 0)],
    "b": [Arrival(1.0, 1)],
  }
  found = SERVER.serve(arrivals, lambda _: 8)
  assert list(found) == ["a", "b"]
  assert [request.waiting for request in found["a"]] == [0, 1, 0]
  # The first reads 800 bytes: 0.08 s, 0.008 s to open, 0.01 s to compute.
  np.testing.assert_allclose(
    [request.finished for request in found["a"]], [0.098, 0.108, 0.118]
  )
  assert [request.read_bytes for request in found["a"]] == [800, 0, 0]
  assert found["b"][0].finished == pytest.approx(1.098)


def test_latency_holds_in_a_burst_only_where_bits_are_shed():
  arrivals = SERVER.arrivals(0)
  fixed = SERVER.serve(arrivals, lambda _: 8)
  shed = SERVER.serve(arrivals, Shedding(BITS))

  def median(run, phase):
    return np.median([r.finished - r.arrived for r in run[phase]])

  assert median(fixed, "burst") > 10 * median(fixed, "before")
  assert median(shed, "burst") < 3 * median(fixed, "before")
  assert {r.bits for r in shed["burst"]} > {2, 4}
  assert shed["after"][-1].bits == 8
  text = printed(load_shedding.print_latencies, {"shed": shed})
  assert "burst" in text and "300" in text


def test_arrivals_have_the_rates_of_their_phases():
  means = {}
  for phase, arrivals in SERVER.arrivals(1).items():
    count, rate = load_shedding.PHASES[phase]
    assert len(arrivals) == count
    times = [arrival.seconds for arrival in arrivals]
    means[phase] = np.diff(times).mean() * rate
    assert {arrival.model for arrival in arrivals} == set(range(8))
  # Four standard errors of an exponential.
  for phase, mean in means.items():
    assert mean == pytest.approx(means["burst"], rel=0.4), phase


def test_costs_are_those_of_opening_the_artifact(tmp_path):
  path = network.Setting("resnet8", 8, bits=BITS).save(tmp_path / "model")
  costs = load_shedding.open_costs(path, rounds=1)
  assert list(costs) == list(BITS)
  for b, cost in costs.items():
    assert cost.bytes == deploy.open(path, b).read_bytes
    assert cost.open_seconds > 0


def test_costs_and_latencies_are_shown(tmp_path):
  setting = network.Setting("resnet8", 8)
  text = printed(load_shedding.print_costs, SERVER, setting)
  assert cells(text, "8")[1:] == ["4", "8.0", "80.0"]
  assert cells(text, "2")[1:] == ["8", "2.0", "20.0"]
  figure = load_shedding.figure(
    {"8 bits": SERVER.serve(SERVER.arrivals(0), lambda _: 8)}
  )
  load_shedding.save_figure(figure, tmp_path / "a.svg")
  assert (tmp_path / "a.svg").read_text().startswith("<?xml")
