"""Trained networks on every test image: in integers, and as ONNX files."""

import jax
import numpy as np
import onnx
import pytest
from flax import nnx
from onnx_files import expected, run
from stored_networks import BITS, stored_network

from dr_jax import nn
from dr_jax.deploy.export.onnx import export_onnx

pytestmark = pytest.mark.slow

INTEGER = ("integer", "im2col", "carrier")


def logits_of(network, images):
  """Logits at every bit-width, [bits, images, classes]."""
  split = nn.functional(network)

  @jax.jit
  def logits(index, images):
    return split.apply(split.params, split.batch_stats, index, images)[0]

  batches = np.split(images, -(-len(images) // 1000))
  return np.array(
    [
      np.concatenate([logits(np.int32(index), batch) for batch in batches])
      for index in range(len(BITS))
    ]
  )


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_predictions_in_integers_are_those_of_the_float_layers(name):
  stored, images = stored_network(name)
  floats = logits_of(stored, images)
  classes = floats.argmax(-1)
  # The network has learned something: it tells classes apart.
  assert min(len(np.unique(row)) for row in classes) >= 6
  first, second = np.sort(floats, -1)[..., :-3:-1].transpose(2, 0, 1)
  network = nnx.clone(stored)
  for backend in INTEGER:
    nn.set_backend(network, backend)
    differ = logits_of(network, images).argmax(-1) != classes
    # Floats are added in another order, which can decide a tie of codes, and
    # that one between classes.
    print(f"{name}, {backend}: {differ.sum(1)} of {len(images)} differ")
    assert (differ.sum(1) <= len(images) / 5000).all()
    assert ((first - second)[differ] < 0.01 * floats.std()).all()


def first_codes(path, x, bits):
  """Input codes of the second quantized layer, as they are laid out there."""
  model = onnx.load(path)
  name = "stage1/block0/conv2/input_codes"
  model.graph.output.append(
    onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None)
  )
  codes = run(model.SerializeToString(), x, name)
  return np.minimum(codes, 2**bits - 1)  # a Clip follows


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_trained_networks_predict_the_same_class_of_every_test_image(
  name, tmp_path
):
  stored, x = stored_network(name)
  exact, fused = tmp_path / "exact.onnx", tmp_path / "fused.onnx"
  for bits in BITS:
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
