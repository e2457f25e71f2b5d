"""Tests of the burst of requests; real times are not tested."""

import numpy as np
import pytest
from tables import cells, printed

from dr_jax.benchmarks import load_shedding
from dr_jax.benchmarks.load_shedding import HIGH, PATIENCE, Shedding

SECONDS = {8: 0.010, 6: 0.006, 4: 0.004, 2: 0.003}


class Fake:
  """A network that takes as long as `SECONDS` says, and its clock."""

  def __init__(self):
    self.now, self.bits = 0.0, 8

  def switch(self, bits):
    self.bits = bits

  def predict(self, x):
    self.now += SECONDS[self.bits]
    return x

  def sleep(self, seconds):
    self.now += seconds


def run(policy, when):
  fake = Fake()
  return load_shedding.serve(
    fake, np.ones(1), when, policy, clock=lambda: fake.now, sleep=fake.sleep
  )


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


def test_requests_are_served_in_order_and_count_those_behind_them():
  when = {"a": np.array([0.0, 0.001, 0.002]), "b": np.array([0.1])}
  found = run(lambda _: 8, when)
  assert list(found) == ["a", "b"]
  assert [request.waiting for request in found["a"]] == [0, 1, 0]
  np.testing.assert_allclose(
    [request.finished for request in found["a"]], [0.01, 0.02, 0.03]
  )
  np.testing.assert_allclose(
    [request.latency for request in found["a"]], [0.01, 0.019, 0.028]
  )
  assert found["b"][0].latency == pytest.approx(0.01)


def test_latency_holds_in_a_burst_only_where_bits_are_shed():
  when = load_shedding.arrivals(SECONDS[8], 0)
  fixed, shed = run(lambda _: 8, when), run(Shedding(load_shedding.BITS), when)

  def median(run, phase):
    return np.median([request.latency for request in run[phase]])

  assert median(fixed, "burst") > 50 * SECONDS[8]
  assert median(shed, "burst") < 4 * SECONDS[8]
  assert {r.bits for r in shed["burst"]} > {4, 6}
  assert shed["after"][-1].bits == 8
  text = printed(load_shedding.latency_table({"shed": shed}))
  assert "400" in text and "burst" in text


def test_arrivals_have_the_rates_of_their_phases():
  when = load_shedding.arrivals(0.01, 1)
  everyone = np.concatenate(list(when.values()))
  assert (np.diff(everyone) > 0).all()
  for phase, (count, rate) in load_shedding.PHASES.items():
    assert len(when[phase]) == count
    mean = np.diff(when[phase]).mean()
    # Four standard errors of an exponential.
    assert mean == pytest.approx(0.01 / rate, rel=4 / count**0.5)


def test_the_network_switches_and_every_cost_is_measured(tmp_path):
  model, x = load_shedding.network(64, 2)
  served = load_shedding.switchable(model, x)
  answers = []
  for bits in load_shedding.BITS:
    served.switch(bits)
    answers.append(np.asarray(served.predict(x)))
  assert not np.array_equal(answers[0], answers[-1])
  np.testing.assert_allclose(answers[0], model(x), atol=0.1)
  costs = load_shedding.service_seconds(served, model, x, rounds=1)
  assert list(costs) == [f"{b} bits" for b in load_shedding.BITS] + ["float32"]
  text = printed(load_shedding.cost_table(costs | {"8 bits": 1.0, "half": 0.5}))
  assert cells(text, "half") == ["500.00", "0.50"]
  figure = load_shedding.figure(
    {"8 bits": run(lambda _: 8, load_shedding.arrivals(0.01, 0))}
  )
  load_shedding.save_figure(figure, tmp_path / "a.svg")
  assert (tmp_path / "a.svg").read_text().startswith("<?xml")
