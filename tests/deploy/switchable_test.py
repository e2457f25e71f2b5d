"""Tests of switching bit-widths while requests are served."""

import collections
import concurrent.futures
import gc
import itertools
import os
import shutil
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import allocate, deploy, models, nn, quant
from dr_jax.deploy.missing import Missing

BITS = (8, 4, 2)
OPTIONS = {"depth": 8, "num_classes": 5, "channels": 1, "widths": (4, 6, 8)}


def images(size=3, seed=1):
  return jax.random.normal(jax.random.key(seed), (size, 8, 8, 1))


def save(path, rounding="half_even", norm="switchable"):
  """Writes an artifact whose norms differ by bit-width."""
  network = nn.quantize(
    models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS),
    weight=quant.double_rounding(BITS, rounding=rounding),
    activation=quant.lsq_activation(BITS),
    sample=images(),
    norm=norm,
  )
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.recalibrate(network, [images(seed=bits)])
  deploy.save(path, network, architecture=("resnet", OPTIONS))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("switchable") / "model"
  save(path)
  return path


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
  """Where codes are stored as planes."""
  path = tmp_path_factory.mktemp("nested") / "model"
  save(path, rounding="half_up")
  return path


@pytest.fixture(scope="module")
def artifact(path):
  return deploy.open(path)


@pytest.fixture(scope="module")
def mixed(artifact):
  """An allocation of every candidate."""
  names = [layer["name"] for layer in artifact.manifest["layers"]]
  return allocate.Allocation(
    dict(zip(names, itertools.cycle((4, 8, 2)), strict=False))
  )


@pytest.fixture
def served(artifact):
  return deploy.Switchable(artifact)


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


def live_bytes():
  gc.collect()
  return sum(array.nbytes for array in jax.live_arrays())


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
  x = np.asarray(images())
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


def test_memory_holds_stored_codes_once(path, mixed):
  x = np.asarray(images())
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


def test_requests_in_flight_hold_no_second_model(served, expected, mixed):
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
    return np.asarray(images())


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


def test_more_bits_read_the_planes_that_are_missing(nested, mixed, compiled):
  whole = deploy.Switchable(nested)
  served = deploy.Switchable(nested, bits=2, sample=images())
  compiled.clear()
  for bits in (2, 4, mixed, 2, 8, 4, mixed):
    whole.switch(bits)
    served.switch(bits)
    np.testing.assert_array_equal(
      served.predict(np.asarray(images())),
      whole.predict(np.asarray(images())),
    )
  assert served.bits == mixed
  assert compiled["jit(serve)"] == 1  # that of `whole`


@pytest.mark.slow
def test_more_bits_read_the_rows_of_norms_of_pairs(tmp_path, mixed):
  save(tmp_path / "model", rounding="half_up", norm="transitional")
  whole = deploy.Switchable(tmp_path / "model")
  served = deploy.Switchable(tmp_path / "model", bits=4)
  for bits in (mixed, 8, 2, 4):
    whole.switch(bits)
    served.switch(bits)
    np.testing.assert_array_equal(
      served.predict(images()), whole.predict(images())
    )


def test_only_planes_that_are_missing_are_read_and_only_once(
  nested, monkeypatch
):
  tensors = deploy.open(nested).store.header.tensors
  read = collections.Counter()
  pread = os.pread

  def reading(descriptor, count, start):
    for name, tensor in tensors.items():
      bytes_of = min(start + count, tensor.end) - max(start, tensor.start)
      read[name] += max(bytes_of, 0)
    return pread(descriptor, count, start)

  served = deploy.Switchable(nested, bits=4)
  monkeypatch.setattr(os, "pread", reading)
  served.switch(4)
  assert not read
  served.switch(8)
  sizes = {f"planes/{p}": tensors[f"planes/{p}"] for p in range(8)}
  # Four bits of half-up rounding need five.
  expected = {n: (t.end - t.start) * (n > "planes/4") for n, t in sizes.items()}
  assert {name: read[name] for name in sizes} == expected
  read.clear()
  for bits in (4, 8):
    served.switch(bits)
  assert not read


def test_reading_planes_replaces_codes_layer_by_layer(nested, monkeypatch):
  served = deploy.Switchable(nested, bits=2)
  x, position_bytes = np.asarray(images()), 4 * 8
  old = np.array(served.predict(x))
  before, peak = live_bytes(), 0
  answers, read = [], Missing.read
  layers = deploy.open(nested).encoded.values()
  largest = max(layer["codes"].nbytes for layer in layers)
  del layers

  def reading(*args):
    nonlocal peak
    answers.append(np.array(served.predict(x)))
    arrays = read(*args)
    peak = max(peak, live_bytes())
    return arrays

  monkeypatch.setattr(Missing, "read", reading)
  served.switch(8)
  # In between, some layers have all planes, and the bit-width is the old one.
  assert len(answers) > 8
  for answer in answers:
    np.testing.assert_array_equal(answer, old)
  assert not np.array_equal(served.predict(x), old)
  assert peak - before <= largest + position_bytes
  assert live_bytes() == before


def test_requests_during_an_upgrade_are_of_the_old_or_the_new_bits(nested):
  x = np.asarray(images())
  served = deploy.Switchable(nested)
  expected = []
  for bits in (2, 8):
    served.switch(bits)
    expected.append(np.asarray(served.predict(x)))
  served = deploy.Switchable(nested, bits=2, sample=x)
  ended = threading.Event()

  def ask(_):
    answers = []
    while not ended.is_set() or len(answers) < 3:
      answers.append(np.asarray(served.predict(x)))
    return answers

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    asked = [pool.submit(ask, n) for n in range(3)]
    served.switch(8)
    ended.set()
    answers = [answer for future in asked for answer in future.result()]
  assert all(any(np.array_equal(a, y) for y in expected) for a in answers)
  np.testing.assert_array_equal(served.predict(x), expected[1])


def test_damaged_planes_raise_and_leave_the_old_bits_serving(nested, tmp_path):
  path = tmp_path / "model"
  shutil.copytree(nested, path)
  served = deploy.Switchable(path, bits=4)
  before = np.asarray(served.predict(images()))
  data = (path / "model.safetensors").read_bytes()
  # The last plane of the last layer, before what follows the sections.
  tensor = deploy.open(path).store.header.tensors["planes/7"]
  damaged = bytearray(data)
  damaged[tensor.end - 1] ^= 1
  (path / "model.safetensors").write_bytes(damaged)
  for _ in range(2):
    with pytest.raises(deploy.ArtifactError, match="planes/7 is damaged"):
      served.switch(8)
    assert served.bits == 4
    np.testing.assert_array_equal(served.predict(images()), before)
  served.switch(2)
  (path / "model.safetensors").write_bytes(data)
  served.switch(8)
  whole = deploy.Switchable(nested)
  np.testing.assert_array_equal(
    served.predict(images()), whole.predict(images())
  )


def test_what_is_stored_is_not_kept_besides_the_codes(path, nested):
  for stored in (path, nested):
    artifact = deploy.open(stored)
    arrays = [*artifact.store.pieces.values()]
    arrays += [a for n, a in artifact.store.tensors.items() if "codes" in n]
    kept = [weakref.ref(array) for array in arrays]
    assert kept
    served = deploy.Switchable(artifact)
    del artifact, arrays
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    served.predict(images())


def test_a_budget_takes_the_most_bytes_that_fit(artifact, mixed):
  served = deploy.Switchable(artifact, allocations=[mixed])
  sizes = {bits: artifact.bytes_at(bits) for bits in (*BITS, mixed)}
  order = sorted(sizes, key=sizes.get, reverse=True)
  assert order == [8, 4, mixed, 2] or order == [8, mixed, 4, 2]
  assert [choice.bits for choice in served.choices] == order
  for bits in order:
    served.switch(budget_bytes=sizes[bits])
    assert served.bits == bits
  for smaller, bits in itertools.pairwise(reversed(order)):
    served.switch(budget_bytes=sizes[bits] - 1)
    assert served.bits == smaller
  served.switch(budget_bytes=10**9)
  assert served.bits == 8


def test_a_budget_takes_the_highest_accuracy_where_it_is_given(artifact, mixed):
  served = deploy.Switchable(
    artifact,
    allocations=[mixed],
    accuracy={8: 97.0, 4: 98.0, 2: 90.0, mixed: 97.0},
  )
  # Of equals, what was given.
  assert [choice.bits for choice in served.choices] == [4, mixed, 8, 2]
  served.switch(budget_bytes=10**9)
  assert served.bits == 4


def test_allocations_are_read_from_files_of_the_export_stage(
  artifact, mixed, tmp_path
):
  mixed.save(tmp_path / "greedy_4.json")
  served = deploy.Switchable(artifact, allocations=[tmp_path / "greedy_4.json"])
  assert mixed in [choice.allocation for choice in served.choices]


@pytest.fixture(scope="module")
def latency(mixed):
  """Times that fall with bits, and fastest at 2 in one layer alone."""
  return allocate.LatencyTable(
    network={8: 20.0, 4: 12.0, 2: 8.0},
    layers={name: {8: 2.0, 4: 1.0, 2: 0.5} for name in mixed},
    measured={},
  )


def test_a_budget_of_time_takes_the_most_accurate_that_is_fast_enough(
  artifact, mixed, latency, tmp_path
):
  latency.save(tmp_path / "latency.json")
  served = deploy.Switchable(
    artifact, allocations=[mixed], latency=tmp_path / "latency.json"
  )
  bits = list(mixed.values())
  ms = 20.0 - bits.count(4) - 1.5 * bits.count(2)
  assert 12.0 < ms < 20.0
  assert {c.bits: c.milliseconds for c in served.choices} == {
    **{8: 20.0, 4: 12.0, 2: 8.0},
    mixed: ms,
  }
  between = next(c.bits for c in served.choices if c.bits != 8)
  for budget, expected in (
    *((20, 8), (19.9, between)),
    *((12.5, 4), (12.0, 4), (11.9, 2), (8.0, 2)),
  ):
    served.switch(budget_ms=budget)
    assert served.bits == expected
  with pytest.raises(
    ValueError, match="budget_ms must be >= 8, the smallest choice, got 7.5"
  ):
    served.switch(budget_ms=7.5)
  with pytest.raises(ValueError, match="budget_ms must be a number, got '9'"):
    served.switch(budget_ms="9")
  assert served.bits == 2


def test_a_latency_table_of_another_network_is_an_error(artifact, latency):
  other = latency._replace(layers=latency.layers | {"conv": {8: 1.0}})
  with pytest.raises(ValueError, match=r"unknown layers \['conv'\]"):
    deploy.Switchable(artifact, latency=other)


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


def test_a_budget_below_the_smallest_choice_names_it(served, artifact):
  smallest = artifact.bytes_at(2)
  with pytest.raises(
    ValueError,
    match=f"budget_bytes must be >= {smallest}, the smallest .* got 100",
  ):
    served.switch(budget_bytes=100)


def test_wrong_choices_are_errors_at_once(artifact, mixed):
  with pytest.raises(ValueError, match="must be one of .*, got 3"):
    deploy.Switchable(artifact, allocations=[dict.fromkeys(mixed, 3)])
  with pytest.raises(ValueError, match="unknown layers"):
    deploy.Switchable(artifact, allocations=[{"conv": 4}])
  with pytest.raises(ValueError, match="must be one of .*, got 3"):
    deploy.Switchable(artifact, bits=3)
  with pytest.raises(
    ValueError, match="accuracy must have every choice, but lacks 2"
  ):
    deploy.Switchable(artifact, accuracy={8: 1.0, 4: 1.0})


def test_layers_compute_with_the_backend_that_is_chosen(artifact, expected):
  served = deploy.Switchable(artifact, backend="integer")
  for bits in BITS:
    served.switch(bits)
    # The same integers, but for sums of floats in another order.
    np.testing.assert_allclose(
      served.predict(images()), expected[bits], rtol=1e-4, atol=1e-4
    )
  with pytest.raises(ValueError, match="backend must be one of"):
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
