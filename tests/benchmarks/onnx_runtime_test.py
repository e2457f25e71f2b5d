"""Tests of the benchmark of exported files; what it times is not tested."""

import numpy as np
import pytest
from tables import cells, printed

from dr_jax.benchmarks import network, onnx_runtime
from dr_jax.benchmarks.onnx_runtime import Speed


def test_speeds_are_shown_with_their_ratios_to_the_float_file():
  speeds = {
    "float": Speed((0.002, 0.001), 500.0, 8),
    "fused": Speed((0.001, 0.0008), 750.0, 7),
  }
  text = printed(onnx_runtime.print_table, "resnet20", 4, 8, speeds)
  assert "resnet20 at 4 bits" in text
  unit = ["2.00", "1.00", "1.00", "1.00", "500", "1.00", "8 of 8"]
  assert cells(text, "float") == unit
  half = ["1.00", "0.50", "0.80", "0.80", "750", "1.50", "7 of 8"]
  assert cells(text, "fused") == half


@pytest.mark.slow
def test_every_file_runs_and_predicts_as_its_network():
  pytest.importorskip("onnxruntime")
  setting = network.Setting("resnet8", image_size=8, bits=(4, 2))
  speeds = onnx_runtime.measure(setting, bits=4, batch=5, rounds=2, threads=1)
  assert list(speeds) == ["float", "tool", "exact", "fused"]
  for name in ("float", "exact", "fused"):
    assert speeds[name].agreement == 5
  for speed in speeds.values():
    median, minimum = speed.latency
    assert 0 < minimum <= median
    assert np.isfinite(speed.throughput)
