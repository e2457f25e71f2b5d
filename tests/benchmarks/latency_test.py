"""Tests of the table of times; the times themselves are not tested."""

import numpy as np
import pytest
from tables import cells, printed

from dr_jax import allocate, nn
from dr_jax.benchmarks import latency, network

SMALL = network.Setting("resnet8", image_size=8, bits=(4, 2))


@pytest.fixture(scope="module")
def served():
  parts = nn.deployed.parts_of(SMALL.quantized())
  return nn.deployed.assemble(SMALL.floating(), parts)


def test_every_layer_gets_inputs_as_in_the_network(served):
  inputs = latency.layer_inputs(served, SMALL.batch(3)["image"])
  assert list(inputs) == [row.name for row in nn.layer_table(served)]
  assert inputs["stage1/block0/conv1"].shape == (3, 8, 8, 16)
  assert inputs["stage2/block0/conv1"].shape == (3, 8, 8, 16)
  assert inputs["stage2/block0/conv2"].shape == (3, 4, 4, 32)
  assert all(x.dtype == np.float32 for x in inputs.values())


def test_network_and_layers_have_a_time_at_every_bit_width(served):
  table = latency.measure(served, SMALL.batch(1)["image"], rounds=2)
  table.check([row.name for row in nn.layer_table(served)], (4, 2))
  rows = [table.network, *table.layers.values()]
  assert all(ms > 0 for row in rows for ms in row.values())


def test_the_table_is_printed_with_the_sum_of_layers():
  table = allocate.LatencyTable(
    {4: 3.0, 2: 2.5}, {"a": {4: 1.0, 2: 0.5}, "b": {4: 0.25, 2: 0.25}}, {}
  )
  text = printed(latency.print_table, table)
  assert cells(text, "4") == ["3.000", "1.250"]
  assert cells(text, "2") == ["2.500", "0.750"]
