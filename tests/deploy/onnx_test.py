"""Tests of ONNX files, run by ONNX Runtime."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx

from dr_jax import data, deploy, models, nn, quant
from dr_jax.deploy.graph import GraphError
from dr_jax.deploy.onnx import export_onnx, export_onnx_switchable

OPTIONS = {"depth": 8, "num_classes": 10, "channels": 1, "widths": (4, 6, 8)}
BITS = (8, 6, 4, 2)
SHAPE = (8, 8, 1)


def images(size, seed=1, shape=SHAPE):
  return np.asarray(jax.random.normal(jax.random.key(seed), (size, *shape)))


def deployed(path, model, weight, *, sample, activation=None, **kwargs):
  """A network as `deploy.load` returns it, with other norms at every bits."""
  activation = activation or quant.lsq_activation(weight.bits)
  network = nn.quantize(
    model, weight=weight, activation=activation, sample=sample, **kwargs
  )
  for bits in weight.bits:
    nn.set_bits(network, bits)
    nn.recalibrate(network, [sample])
  deploy.save(path, network)
  return deploy.load(path, model=model)


@pytest.fixture(scope="module")
def digits():
  """All test images of scikit-learn's digits."""
  test = data.load("digits").test
  return np.stack([test[i]["image"] for i in range(len(test))])


@pytest.fixture(scope="module")
def network(tmp_path_factory, digits):
  model = models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS)
  return deployed(
    tmp_path_factory.mktemp("artifact") / "model",
    model,
    quant.double_rounding(BITS),
    sample=digits[:64],
    norm="transitional",
  )


def run(path, x):
  session = onnxruntime.InferenceSession(
    path, providers=["CPUExecutionProvider"]
  )
  (y,) = session.run(None, {"input": x})
  return y


def expected(network, x, bits=None):
  network = nnx.clone(network)
  if bits is not None:
    nn.set_bits(network, bits)
  return np.asarray(jax.jit(lambda x: network(x))(jnp.asarray(x)))


@pytest.mark.parametrize("bits", [*BITS, "mixed"])
def test_predictions_on_all_digits_are_those_of_the_network(
  network, digits, tmp_path, bits
):
  if bits == "mixed":
    rows = nn.layer_table(network)
    bits = {row.name: BITS[i % 4] for i, row in enumerate(rows)}
  export_onnx(tmp_path / "model.onnx", network, SHAPE, bits=bits)
  logits = run(tmp_path / "model.onnx", digits)
  wanted = expected(network, digits, bits)
  np.testing.assert_array_equal(logits.argmax(-1), wanted.argmax(-1))
  # Sums of integers are exact; floats between them are in another order.
  assert np.median(np.abs(logits - wanted)) < 1e-5


def test_weights_in_the_file_are_the_integers_of_the_bit_width(
  network, tmp_path
):
  export_onnx(tmp_path / "model.onnx", network, SHAPE, bits=4)
  model = onnx.load(tmp_path / "model.onnx")
  stored = {
    t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer
  }
  layers = nn.layers.quantized_layers(network)
  for name, layer in layers.items():
    codes, _ = layer.weight_quantizer.integers(
      nn.layers.arrays_of(layer.encoded), BITS.index(4)
    )
    found = stored[f"{name}/weight_codes"]
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_one_file_takes_batches_of_every_size(network, digits, tmp_path, batch):
  export_onnx(tmp_path / "model.onnx", network, SHAPE)
  logits = run(tmp_path / "model.onnx", digits[:batch])
  wanted = expected(network, digits[:batch])
  np.testing.assert_allclose(logits, wanted, atol=1e-4)


class Sorts(nnx.Module):
  def __init__(self):
    self.head = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return jnp.sort(self.head(x))


def test_a_primitive_without_counterpart_is_named(tmp_path):
  with pytest.raises(GraphError, match="sort"):
    export_onnx(tmp_path / "model.onnx", Sorts(), (4,))
  assert not (tmp_path / "model.onnx").exists()


def test_an_opset_that_is_too_old_is_named_with_the_smallest_allowed(
  network, tmp_path
):
  with pytest.raises(ValueError, match=r"opset must be in 18\.\..*, got 12"):
    export_onnx(tmp_path / "model.onnx", network, SHAPE, opset=12)


def test_without_onnx_one_line_says_what_to_install(
  network, tmp_path, monkeypatch
):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"pip install 'dr_jax\[onnx\]'"):
    export_onnx(tmp_path / "model.onnx", network, SHAPE)


@pytest.fixture(scope="module")
def switchable(network, tmp_path_factory):
  path = tmp_path_factory.mktemp("onnx") / "all.onnx"
  export_onnx_switchable(path, network, SHAPE)
  return path


def test_one_file_predicts_as_the_network_at_every_bit_width(
  network, digits, switchable
):
  session = onnxruntime.InferenceSession(
    switchable, providers=["CPUExecutionProvider"]
  )
  for bits in BITS:
    (logits,) = session.run(
      None, {"input": digits, "bits": np.array(bits, np.int64)}
    )
    wanted = expected(network, digits, bits)
    np.testing.assert_array_equal(logits.argmax(-1), wanted.argmax(-1))
    assert np.median(np.abs(logits - wanted)) < 1e-5


def test_one_file_for_all_bit_widths_stores_the_highest_codes_once(
  network, switchable
):
  stored = onnx.load(switchable).graph.initializer
  arrays = [onnx.numpy_helper.to_array(t) for t in stored]
  codes = [a for a in arrays if a.dtype == np.int8]
  layers = nn.layers.quantized_layers(network).values()
  assert len(codes) == len(layers)
  total = sum(layer.encoded["codes"].size for layer in layers)
  assert sum(a.size for a in codes) == total


@pytest.mark.parametrize(
  ("weight_type", "bits", "opset"), [("int4", 4, 21), ("int2", 2, 25)]
)
def test_packed_weights_take_their_bits_and_predict_the_same(
  network, digits, tmp_path, weight_type, bits, opset
):
  wide, narrow = tmp_path / "wide.onnx", tmp_path / "narrow.onnx"
  options = {"bits": bits, "opset": opset}
  export_onnx(wide, network, SHAPE, **options)
  export_onnx(narrow, network, SHAPE, weight_type=weight_type, **options)
  np.testing.assert_array_equal(run(narrow, digits), run(wide, digits))
  codes = [
    t
    for t in onnx.load(narrow).graph.initializer
    if t.name.endswith("weight_codes")
  ]
  assert len(codes) == len(nn.layers.quantized_layers(network))
  for tensor in codes:
    assert len(tensor.raw_data) == -(-np.prod(tensor.dims) * bits // 8)


class Perceptron(nnx.Module):
  def __init__(self):
    self.hidden = nnx.Linear(20, 150, rngs=nnx.Rngs(0))
    self.head = nnx.Linear(150, 5, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.head(nnx.gelu(self.hidden(x)))


@pytest.mark.parametrize("bits", [8, 4])
def test_linear_layers_of_float_input_stay_packed(tmp_path, bits):
  sample = images(6, shape=(20,))
  network = nn.quantize(
    Perceptron(),
    weight=quant.double_rounding((8, 4)),
    sample=sample,
    skip=(),
  )
  deploy.save(tmp_path / "model", network)
  network = deploy.load(tmp_path / "model", model=Perceptron())
  path = tmp_path / "model.onnx"
  for arithmetic in ("exact", "fused"):
    export_onnx(
      path,
      network,
      (20,),
      bits=bits,
      arithmetic=arithmetic,
      weight_type="int4",
    )
    np.testing.assert_allclose(
      run(path, sample), expected(network, sample, bits), atol=1e-5
    )
  found = [node for node in onnx.load(path).graph.node if node.domain]
  assert [node.op_type for node in found] == ["MatMulNBits"] * 2
  assert [onnx.helper.get_node_attr_value(n, "bits") for n in found] == [
    bits
  ] * 2
