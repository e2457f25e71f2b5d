"""Tests of tables of measured times."""

import json
import re

import pytest

from dr_jax.allocate import Allocation, LatencyTable

TABLE = LatencyTable(
  network={8: 10.0, 4: 7.0, 2: 4.0},
  layers={"a": {8: 5.0, 4: 3.0, 2: 2.0}, "b": {8: 2.0, 4: 1.0, 2: 0.5}},
  measured={"batch": 1, "device": "cpu"},
)


def test_what_was_written_is_read(tmp_path):
  TABLE.save(tmp_path / "latency.json")
  assert LatencyTable.load(tmp_path / "latency.json") == TABLE


@pytest.mark.parametrize(
  ("bits", "milliseconds"),
  [
    ({"a": 8, "b": 8}, 10.0),
    ({"a": 2, "b": 2}, 4.0),  # measured, and not 10 - 3 - 1.5
    ({"a": 4, "b": 8}, 8.0),
    ({"a": 4, "b": 2}, 6.5),
  ],
)
def test_an_allocation_takes_what_its_layers_save(bits, milliseconds):
  assert TABLE.milliseconds(Allocation(bits)) == milliseconds


def test_layers_are_given_in_seconds():
  assert TABLE.layer_seconds["a"] == {8: 0.005, 4: 0.003, 2: 0.002}


@pytest.mark.parametrize(
  ("layers", "bits", "message"),
  [
    (["a"], (8, 4), "unknown layers ['b'], missing layers []"),
    (["a", "b", "c"], (8, 4), "unknown layers [], missing layers ['c']"),
    (["a", "b"], (8, 3), "must have (8, 3) bits of network, but lacks 3"),
  ],
)
def test_a_table_of_another_network_names_what_differs(layers, bits, message):
  TABLE.check(["b", "a"], (8, 2))
  with pytest.raises(ValueError, match=re.escape(message)):
    TABLE.check(layers, bits)


def test_bits_that_one_layer_lacks_are_named():
  lacking = TABLE._replace(layers=TABLE.layers | {"b": {8: 1.0}})
  with pytest.raises(ValueError, match="of b, but lacks 4"):
    lacking.check(["a", "b"], (8, 4))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"network_ms": {"8": -1}}, "network_ms.8 must be milliseconds >= 0, got"),
    ({"network_ms": {"8": "1"}}, "network_ms.8 must be milliseconds >= 0, got"),
    ({"layers_ms": {"a": {"x": 1}}}, "layers_ms.a must be {bits: milliseco"),
    ({"layers_ms": [1]}, "layers_ms must be an object, got"),
    ({"other": 1}, "it must be an object with network_ms, layers_ms, meas"),
  ],
)
def test_a_file_of_something_else_names_the_entry(tmp_path, change, message):
  path = tmp_path / "latency.json"
  TABLE.save(path)
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(
    ValueError, match=f"latency.json is damaged: {re.escape(message)}"
  ):
    LatencyTable.load(path)
