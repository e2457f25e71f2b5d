"""Tests of where arrays go; tests/train/sharded_step_test.py trains there."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dr_jax.runtime import sharding


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((3, 3, 16, 64), P(None, None, None, "data")),
    ((3, 3, 64, 16), P(None, None, "data")),
    ((64, 64), P(None, "data")),  # Of equals the last: its outputs.
    ((5, 9, 97), P()),  # No axis of which four devices hold equal parts.
    ((4, 16), P(None, "data")),  # The smallest that is cut.
    ((4, 8), P()),  # Too small to be worth it.
    ((), P()),
  ],
)
def test_a_large_parameter_is_cut_along_its_largest_axis(shape, spec):
  layout = sharding.layout(data=4, parameters="sharded")._replace(smallest=64)
  assert layout.spec(jnp.zeros(shape)) == spec
  assert layout._replace(parameters="replicated").spec(jnp.zeros(shape)) == P()


def test_flat_has_the_same_devices_all_along_the_data():
  layout = sharding.layout(data=2, bits=2)
  assert (layout.data, layout.bits) == (2, 2)
  flat = layout.flat()
  assert (flat.data, flat.bits) == (4, 1)
  assert list(flat.mesh.devices.flat) == list(layout.mesh.devices.flat)


def of_processes(rows):
  """A layout whose devices are of these processes, [data, bits]."""
  devices = np.empty(np.shape(rows), object)
  for position, number in np.ndenumerate(rows):
    devices[position] = types.SimpleNamespace(process_index=number)
  shape = {"data": devices.shape[0], "bits": devices.shape[1]}
  return sharding.Layout(types.SimpleNamespace(devices=devices, shape=shape))


@pytest.mark.parametrize(
  ("rows", "process", "shard"),
  [
    ([[0], [0], [1], [1]], 0, (0, 2)),
    ([[0], [0], [1], [1]], 1, (1, 2)),
    ([[1], [1], [0], [0]], 0, (1, 2)),  # In another order than processes.
    ([[0, 0], [1, 1]], 1, (1, 2)),
    ([[0, 1], [2, 3]], 1, (0, 2)),  # Two processes feed the same rows.
    ([[0, 1], [2, 3]], 3, (1, 2)),
    ([[0, 1]], 1, (0, 1)),
  ],
)
def test_a_process_feeds_the_rows_that_its_devices_hold(
  monkeypatch, rows, process, shard
):
  monkeypatch.setattr(jax, "process_index", lambda: process)
  assert of_processes(rows).shard == shard


@pytest.mark.parametrize(
  "rows",
  [[[0, 1], [0, 2], [1, 2]], [[0], [0], [1]]],
  ids=["overlap", "unequal"],
)
def test_processes_that_do_not_divide_a_batch_raise_an_error(rows):
  with pytest.raises(
    ValueError, match="devices must be such that processes hold equal"
  ):
    of_processes(rows).shard  # noqa: B018


def test_a_layout_has_the_devices_that_it_is_given():
  first, *_, last = jax.devices()
  layout = sharding.layout(devices=[last, first])
  assert list(layout.mesh.devices.flat) == [last, first]
  assert sharding.layout().data == len(jax.devices())
  assert list(sharding.layout(data=1).mesh.devices.flat) == [first]


@pytest.mark.parametrize(
  ("wanted", "message"),
  [
    ({"data": -1}, r"data must be in 0\.\.4 with.*got -1"),
    ({"data": 3, "bits": 2}, r"data must be in 0\.\.2 with.*got 3"),
    ({"bits": 0}, "bits must be a divisor of 4, .* got 0"),
    ({"bits": 3}, "bits must be a divisor of 4, .* got 3"),
    (
      {"parameters": "split"},
      "parameters must be one of replicated, sharded, got",
    ),
    ({"norm": "local"}, "norm must be one of global, per_device, got 'local'"),
  ],
)
def test_a_layout_that_does_not_fit_raises_an_error(wanted, message):
  with pytest.raises(ValueError, match=message):
    sharding.layout(**wanted)


def test_several_processes_leave_no_device_out(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert sharding.layout(data=4).data == 4
  with pytest.raises(ValueError, match="data must be 0, all devices,.*got 2"):
    sharding.layout(data=2)
