"""Tests of ONNX files of trained networks, on all test images."""

import numpy as np
import onnx
import pytest
import stored_networks
from onnx_files import expected, run
from stored_networks import stored_network

from dr_jax.deploy.export.onnx import export_onnx


def first_codes(path, x, bits):
  """Input codes of the second quantized layer, as they are laid out there."""
  model = onnx.load(path)
  name = "stage1/block0/conv2/input_codes"
  model.graph.output.append(
    onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None)
  )
  codes = run(model.SerializeToString(), x, name)
  return np.minimum(codes, 2**bits - 1)  # a Clip follows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_trained_networks_predict_the_same_class_of_every_test_image(
  name, tmp_path
):
  stored, x = stored_network(name)
  exact, fused = tmp_path / "exact.onnx", tmp_path / "fused.onnx"
  for bits in stored_networks.BITS:
    export_onnx(exact, stored, x.shape[1:], bits=bits)
    classes = run(exact, x).argmax(-1)
    wanted = expected(stored, x, bits).argmax(-1)
    differ = np.sum(classes != wanted)
    print(
      f"{name}, {bits} bits, exact: {differ} of {len(x)} predictions differ"
    )
    # Floats are added in another order, which decides a tie of codes.
    assert differ <= len(x) / 5000

    found = export_onnx(
      fused, stored, x.shape[1:], bits=bits, arithmetic="fused"
    )
    channels = np.concatenate([*found.values()])
    differ = np.sum(run(fused, x).argmax(-1) != classes)
    codes = first_codes(fused, x, bits).transpose(0, 2, 3, 1)
    moved = np.mean(codes != first_codes(exact, x, bits))
    print(
      f"{name}, {bits} bits, fused: {differ} predictions and {moved:.1e} of "
      f"the first codes differ from exact; {channels.sum()} of {channels.size} "
      "channels are exact"
    )
    if bits <= 4:
      assert (differ, moved, channels.all()) == (0, 0, True)
    else:  # training is not the same on every machine
      assert differ <= len(x) / 1000
      assert moved < 2e-4
