"""Tests of the benchmark of switches; times are not tested."""

import pytest
from tables import cells, printed

from dr_jax import deploy
from dr_jax.benchmarks import network, switch

SMALL = network.Setting("resnet8")


@pytest.mark.slow
def test_a_switch_is_compared_with_the_bytes_that_it_reads(tmp_path):
  path = SMALL.save(tmp_path / "model")
  measured = switch.with_reading(path, SMALL, 4, 8, rounds=2)
  assert len(measured.switch) == len(measured.plain) == 2
  opened = deploy.open(path, 4)
  assert measured.count == opened.upgrade(8).read_bytes - opened.read_bytes
  measured = switch.in_memory(path, SMALL, rounds=1)
  assert measured.count == deploy.open(path).tensor_bytes


def test_ratios_are_of_medians():
  row = switch.Measured(2_500_000, [0.001, 0.003, 0.2], [0.002, 0.001, 0.004])
  text = printed(switch.print_table, "title", {"in memory": row})
  assert cells(text, "in memory") == ["2.50", "3.000", "2.000", "1.50"]
