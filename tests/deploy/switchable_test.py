"""Tests of switching bit-widths while requests are served."""

import concurrent.futures
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_artifact import SERVED as BITS
from small_artifact import images

from dr_jax import deploy, nn, quant


@pytest.fixture(scope="module")
def expected(artifact, mixed):
  """The outputs of every assignment; all differ."""
  served = deploy.Switchable(artifact)
  outputs = {}
  for bits in (*BITS, mixed):
    served.switch(bits)
    outputs[bits] = np.asarray(served.predict(images()))
  for one, other in itertools.combinations(outputs.values(), 2):
    assert not np.array_equal(one, other)
  return outputs


def test_outputs_are_those_of_the_loaded_network(artifact, mixed, expected):
  for bits in (*BITS, mixed):
    loaded = nnx.jit(artifact.load(bits=bits))
    # Another program, which may sum in another order.
    np.testing.assert_allclose(
      expected[bits], loaded(images()), rtol=1e-5, atol=1e-5
    )


def test_it_starts_at_the_highest_or_the_given_bits(path, mixed):
  assert deploy.Switchable(path).bits == 8
  assert deploy.Switchable(path, bits=4).bits == 4
  assert deploy.Switchable(path, bits=mixed).bits == mixed


def test_bits_and_bytes_are_those_of_the_assignment_in_use(
  served, artifact, mixed
):
  for bits in (4, 2, mixed, dict(mixed), 8):
    served.switch(bits)
    assert (served.bits, served.bytes) == (bits, artifact.bytes_at(bits))
  served.switch(dict.fromkeys(mixed, 4))
  assert served.bits == 4


def test_an_allocation_may_name_its_layers_in_any_order(
  served, mixed, expected
):
  served.switch(dict(reversed(list(mixed.items()))))
  np.testing.assert_array_equal(served.predict(images()), expected[mixed])


def test_switches_compile_nothing(path, artifact, mixed, compiled):
  served = deploy.Switchable(path, sample=images(), allocations=[mixed])
  assert compiled["jit(serve)"] == 1
  compiled.clear()
  x = images()
  for bits in (*BITS, mixed, *BITS):
    served.switch(bits)
    served.predict(x)
  served.switch(budget_bytes=artifact.bytes_at(4))
  served.predict(x)
  assert not compiled


def test_the_first_requests_of_several_threads_compile_one_program(
  artifact, compiled
):
  served = deploy.Switchable(artifact)
  x = images(size=4)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: served.predict(x), range(4)))
  assert compiled["jit(serve)"] == 1


def test_memory_holds_stored_codes_once(path, mixed, live_bytes):
  x = images()
  deploy.Switchable(path).predict(x)  # Constants that stay.
  before = live_bytes()
  served = deploy.Switchable(path)
  tensor_bytes = deploy.open(path).tensor_bytes
  position_bytes = 4 * len(mixed)
  assert live_bytes() - before == tensor_bytes + position_bytes
  for bits in (*BITS, mixed) * 5:
    served.switch(bits)
    served.predict(x)
  assert live_bytes() - before == tensor_bytes + position_bytes


def test_requests_in_flight_hold_no_second_model(
  served, expected, mixed, live_bytes
):
  x = images()
  served.predict(x)
  before = live_bytes()
  outputs = []
  for bits in (*BITS, mixed) * 5:
    served.switch(bits)
    outputs.append(served.predict(x))
  # Whether they have ended or not: only what they return.
  assert live_bytes() - before == sum(y.nbytes for y in outputs)


class SwitchesWhenRead:
  """Inputs that switch the bit-width when the request reads them."""

  def __init__(self, served, bits):
    self.served, self.bits = served, bits

  def __array__(self, dtype=None, copy=None):
    self.served.switch(self.bits)
    return images()


def test_a_request_ends_at_the_bits_it_began_with(served, expected):
  y = served.predict(SwitchesWhenRead(served, 2))
  assert served.bits == 2
  np.testing.assert_array_equal(y, expected[8])
  np.testing.assert_array_equal(served.predict(images()), expected[2])


def test_every_answer_under_thousands_of_switches_is_of_one_assignment(
  served, expected
):
  x, wrong = images(), jnp.ones((1, 8, 8, 2))
  served.predict(x)
  outputs = list(expected.values())
  requests, ended = 150, threading.Event()

  def ask(_):
    answers = [np.asarray(served.predict(x)) for _ in range(requests)]
    return sum(any(np.array_equal(a, y) for y in outputs) for a in answers)

  def ask_wrongly(_):
    errors = 0
    for _ in range(20):
      try:
        served.predict(wrong)
      except Exception:  # As Flax has it.
        errors += 1
    return errors

  def switch():
    count = 0
    for bits in itertools.cycle(expected):
      served.switch(bits)
      count += 1
      if ended.is_set() and count >= 3000:
        return count

  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    switches = pool.submit(switch)
    right = [pool.submit(ask, n) for n in range(4)]
    errors = pool.submit(ask_wrongly, 0)
    assert [future.result() for future in right] == [requests] * 4
    assert errors.result() == 20
    ended.set()
    assert switches.result() >= 3000


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"bits": 5}, r"bits must be one of \(8, 4, 2\), got 5"),
    ({"bits": {"conv": 4}}, r"unknown layers \['conv'\], missing layers \["),
    ({"budget_bytes": -1}, "budget_bytes must be an integer >= 0, got -1"),
    (
      {"budget_bytes": 1e9},
      "budget_bytes must be an integer >= 0, got 1000000000.0",
    ),
    ({"budget_ms": 1.0}, "budget_ms needs a latency table: Switchable"),
    ({}, "switch takes one of bits, budget_bytes, budget_ms, got none"),
    ({"bits": 4, "budget_bytes": 10**9}, "got bits and budget_bytes"),
  ],
)
def test_wrong_arguments_are_one_line_and_change_nothing(
  served, arguments, message
):
  served.switch(4)
  with pytest.raises(ValueError, match=message) as error:
    served.switch(**arguments)
  assert len(str(error.value).splitlines()) == 1
  assert served.bits == 4


def test_layers_compute_with_the_backend_that_is_chosen(artifact, expected):
  served = deploy.Switchable(artifact, backend="integer")
  for bits in BITS:
    served.switch(bits)
    # The same integers, but for sums of floats in another order.
    np.testing.assert_allclose(
      served.predict(images()), expected[bits], rtol=1e-4, atol=1e-4
    )
  with pytest.raises(
    ValueError, match=r"backend must be one of .*'auto'\), got"
  ):
    deploy.Switchable(artifact, backend="fast")


def test_products_that_read_planes_switch_to_more_bits(tmp_path):
  model = nnx.Linear(40, 6, rngs=nnx.Rngs(0))
  x = np.asarray(jax.random.normal(jax.random.key(0), (1, 40)))
  weight = quant.double_rounding(BITS, rounding="half_up")
  network = nn.quantize(model, weight=weight, sample=x, skip=())
  deploy.save(tmp_path / "model", network)
  served = deploy.Switchable(
    tmp_path / "model", model=model, bits=2, backend="planes", sample=x
  )
  for bits in (2, 8, 4):
    served.switch(bits)
    nn.set_bits(network, bits)
    np.testing.assert_allclose(
      served.predict(x), network(x), rtol=1e-5, atol=1e-5
    )


def test_a_network_without_an_architecture_is_given(tmp_path):
  model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
  network = nn.quantize(
    model, weight=quant.double_rounding(BITS), sample=jnp.ones((1, 6)), skip=()
  )
  deploy.save(tmp_path / "model", network)
  with pytest.raises(deploy.ArtifactError, match="names no architecture"):
    deploy.Switchable(tmp_path / "model")
  served = deploy.Switchable(tmp_path / "model", model=model, bits=2)
  nn.set_bits(network, 2)
  np.testing.assert_array_equal(served.predict(jnp.eye(6)), network(jnp.eye(6)))
