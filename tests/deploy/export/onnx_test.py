"""Tests of ONNX files, run by ONNX Runtime."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import training_network
from flax import nnx
from onnx_files import expected, run

from dr_jax import data, deploy, models, nn, quant
from dr_jax.deploy.export.graph import GraphError
from dr_jax.deploy.export.onnx import export_onnx, export_onnx_switchable

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


def set_gains_of_norms(model):
  """Gains of both signs, and one that is zero in every norm."""
  rng = np.random.default_rng(0)
  for _, module in nnx.iter_modules(model):
    if isinstance(module, nnx.BatchNorm):
      gains = rng.choice([-1.0, 1.0], module.num_features)
      gains *= rng.uniform(0.5, 1.5, module.num_features)
      gains[-1] = 0.0
      module.scale[...] = jnp.asarray(gains, jnp.float32)


@pytest.fixture(scope="module")
def digits():
  """All test images of scikit-learn's digits."""
  test = data.load("digits").test
  return np.stack([test[i]["image"] for i in range(len(test))])


@pytest.fixture(scope="module")
def network(tmp_path_factory, digits):
  model = models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS)
  set_gains_of_norms(model)
  return deployed(
    tmp_path_factory.mktemp("artifact") / "model",
    model,
    quant.double_rounding(BITS),
    sample=digits[:64],
    norm="transitional",
  )


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


@pytest.mark.parametrize("bits", BITS)
def test_fused_convolutions_give_the_codes_of_the_network(
  network, digits, tmp_path, bits
):
  exact, fused = tmp_path / "exact.onnx", tmp_path / "fused.onnx"
  assert export_onnx(exact, network, SHAPE, bits=bits) == {}
  found = export_onnx(fused, network, SHAPE, bits=bits, arithmetic="fused")
  assert list(found) == [f"stage{n}/block0/conv1" for n in (1, 2, 3)]
  wanted, logits = run(exact, digits), run(fused, digits)
  np.testing.assert_array_equal(logits.argmax(-1), wanted.argmax(-1))
  if bits <= 4:
    assert all(np.all(channels) for channels in found.values())
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_weights_in_the_file_are_the_integers_of_the_bit_width(
  network, tmp_path
):
  export_onnx(tmp_path / "model.onnx", network, SHAPE, bits=4)
  model = onnx.load(tmp_path / "model.onnx")
  stored = {
    t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer
  }
  layers = nn.quantized.quantized_layers(network)
  for name, layer in layers.items():
    codes, _ = layer.weight_quantizer.integers(
      nn.bits.arrays_of(layer.encoded), BITS.index(4)
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


class Pooled(nnx.Module):
  """Strides, a pool, depthwise and pointwise kernels, a sum, an average.

  Inputs of "mix" and "wide" are signed.
  """

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.stem = nnx.Conv(1, 6, (3, 3), strides=2, rngs=rngs)
    self.depthwise = nnx.Conv(
      6, 6, (3, 3), feature_group_count=6, use_bias=False, rngs=rngs
    )
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.project = nnx.Conv(
      6, 6, (1, 1), bias_init=nnx.initializers.normal(), rngs=rngs
    )
    self.mix = nnx.Conv(6, 6, (3, 3), rngs=rngs)
    self.wide = nnx.Conv(6, 8, (3, 3), strides=2, rngs=rngs)
    self.head = nnx.Linear(8, 5, rngs=rngs)

  def __call__(self, x):
    x = nnx.max_pool(nnx.relu(self.stem(x)), (3, 3), (2, 2), "SAME")
    y = nnx.relu6(self.norm(self.depthwise(x)))
    x = x + self.mix(self.project(y))
    return self.head(nnx.relu(self.wide(x)).mean((1, 2)))


@pytest.mark.parametrize("arithmetic", ["exact", "fused"])
def test_strides_pools_and_depthwise_kernels_are_those_of_the_network(
  arithmetic, tmp_path
):
  shape = (17, 17, 1)
  sample = images(8, shape=shape)
  network = deployed(
    tmp_path / "model", Pooled(), quant.double_rounding((4,)), sample=sample
  )
  path = tmp_path / "model.onnx"
  found = export_onnx(path, network, shape, arithmetic=arithmetic)
  fused = ["depthwise", "project"] if arithmetic == "fused" else []
  assert list(found) == fused
  assert all(np.all(channels) for channels in found.values())
  logits, wanted = run(path, sample), expected(network, sample)
  assert np.median(np.abs(logits - wanted)) < 1e-5


METHODS = {
  "lsq": (quant.lsq((8, 4)), None),
  "bit_mixer": (quant.bit_mixer((8, 2)), None),
  "odd_codes": (quant.adabits((8, 3), scheme="centered"), None),
  "clipped": (quant.double_rounding((8, 4)), quant.pact_activation((8, 4))),
  "unit": (quant.any_precision((8, 4)), quant.unit_activation((8, 4))),
  "rows": (quant.double_rounding((8, 4)), quant.dynamic_activation((8, 4))),
  "no_integers": (
    quant.term_quantization((8, 4)),
    quant.lsq_plus_activation((8, 4)),
  ),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_outputs_of_its_network(method, tmp_path):
  weight, activation = METHODS[method]
  sample = training_network.batch()["image"]
  network = deployed(
    tmp_path / "model",
    training_network.Net(nnx.Rngs(0)),
    weight,
    sample=sample,
    activation=activation,
  )
  bits = weight.bits[-1]
  path = tmp_path / "model.onnx"
  export_onnx(path, network, sample.shape[1:], bits=bits)
  logits = run(path, np.asarray(sample))
  np.testing.assert_allclose(logits, expected(network, sample, bits), atol=1e-5)


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


@pytest.mark.parametrize("shape", [(8, 8), 8, "88"])
def test_a_shape_that_does_not_fit_is_one_line(network, tmp_path, shape):
  with pytest.raises(ValueError, match="sample_shape must fit the") as raised:
    export_onnx(tmp_path / "model.onnx", network, shape)
  assert "\n" not in str(raised.value)
  assert not list(tmp_path.iterdir())


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
  layers = nn.quantized.quantized_layers(network).values()
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
  assert len(codes) == len(nn.quantized.quantized_layers(network))
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
