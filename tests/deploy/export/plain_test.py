"""Tests of plain safetensors files: the integers, in PyTorch's layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import small_artifact
from flax import nnx
from small_artifact import BITS, images

from dr_jax import deploy, nn, quant
from dr_jax.deploy.export.plain import export_safetensors


def read(path):
  """Tensors and metadata; what is JSON in the latter, parsed."""
  with safetensors.safe_open(path, "np") as file:
    about = file.metadata()
  about = {k: v if k == "format" else json.loads(v) for k, v in about.items()}
  return safetensors.numpy.load_file(path), about


def output_first(kernel):
  """A Flax kernel in PyTorch's layout."""
  return np.moveaxis(kernel, (-1, -2), (0, 1))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
  path = tmp_path_factory.mktemp("artifact") / "model"
  small_artifact.save(path)
  return deploy.open(path)


@pytest.fixture(scope="module", params=["four", "mixed"])
def exported(request, artifact, tmp_path_factory):
  """A network, and its plain file at the same bits."""
  bits = 4 if request.param == "four" else small_artifact.mixed(artifact)
  path = tmp_path_factory.mktemp("plain") / "model.safetensors"
  export_safetensors(path, artifact, bits=bits)
  return artifact.load(bits=bits), path


def test_integers_times_scales_are_the_kernels_bit_for_bit(exported):
  network, path = exported
  tensors, about = read(path)
  for row in nn.layer_table(network):
    name = row.name.replace("/", ".")
    codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    assert codes.dtype == np.int8 and scale.shape == codes.shape[:1]
    assert about["layers"][name]["bits"] == row.bits
    low, high = -(2 ** (row.bits - 1)), 2 ** (row.bits - 1) - 1
    assert low <= codes.min() and codes.max() <= high
    kernel = nn.quantized.quantized_layers(network)[row.name].kernel
    got = codes.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(got, output_first(np.asarray(kernel)))


def test_inputs_are_rounded_by_their_scale_and_ends(exported):
  network, path = exported
  tensors, about = read(path)
  x = np.asarray(jax.random.normal(jax.random.key(0), (500,))) * 3
  for name, layer in nn.quantized.quantized_layers(network).items():
    name = name.replace("/", ".")
    scale, ends = (
      tensors[f"{name}.input_scale"],
      about["layers"][name]["input_codes"],
    )
    params = nn.bits.arrays_of(layer.input_params)
    quantize = layer.input_quantizer.fake_quantize
    expected = quantize(params, x, layer.bits.get_value())
    got = np.clip(np.round(x * (1 / scale)), *ends) * scale
    np.testing.assert_array_equal(got, expected)


def test_norms_have_the_row_of_their_layers_and_normalize_nothing(exported):
  network, path = exported
  tensors, _ = read(path)
  norms = {
    nn.leaves.name_of(path): module
    for path, module in nnx.iter_modules(network)
    if isinstance(module, nn.norm.FoldedNorm)
  }
  assert len(norms) > 5
  for name, norm in norms.items():
    name = name.replace("/", ".")
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    x = np.linspace(-2, 3, 5 * weight.size, dtype=np.float32)
    x = x.reshape(5, -1)
    expected = norm(x)
    np.testing.assert_allclose(
      x * weight[None] + bias[None], expected, rtol=1e-6, atol=1e-6
    )
    assert (tensors[f"{name}.running_mean"] == 0).all()
    assert (tensors[f"{name}.running_var"] == 1).all()


def test_float_layers_have_pytorchs_names_and_layouts(exported):
  network, path = exported
  tensors, _ = read(path)
  kernel = np.asarray(network.stem.kernel[...])
  np.testing.assert_array_equal(tensors["stem.weight"], output_first(kernel))
  assert tensors["stem.weight"].shape == (4, 1, 3, 3)
  np.testing.assert_array_equal(tensors["head.weight"], network.head.kernel.T)
  np.testing.assert_array_equal(tensors["head.bias"], network.head.bias)


def test_metadata_say_how_codes_came_about(exported):
  _, about = read(exported[1])
  assert about["format"] == "pt"
  assert about["method"]["options"]["rounding"] == "half_even"
  assert about["activation"]["name"] == "lsq_activation"


class Network(nnx.Module):
  """A convolution in groups, a norm and a linear layer, both with biases."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.conv = nnx.Conv(
      4, 6, (3, 3), padding=1, feature_group_count=2, rngs=rngs
    )
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.head = nnx.Linear(6, 5, rngs=rngs)
    for layer in (self.conv, self.head):
      layer.bias[...] = jax.random.normal(rngs(), layer.bias.shape)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def plain(tmp_path, weight, activation=None, bits=None):
  """The loaded network of all layers above, and its plain file."""
  x = np.asarray(jax.random.normal(jax.random.key(1), (3, 8, 8, 4)))
  network = nn.quantize(
    Network(), weight=weight, activation=activation, sample=x, skip=()
  )
  deploy.save(tmp_path / "model", network)
  artifact = deploy.open(tmp_path / "model")
  bits = bits or weight.bits[-1]
  export_safetensors(tmp_path / "plain", artifact, bits=bits)
  return artifact.load(model=Network(), bits=bits), x


def test_pytorch_computes_the_same_from_the_file_alone(tmp_path):
  torch = pytest.importorskip("torch", reason="PyTorch is not installed")
  from safetensors import torch as files

  network, x = plain(
    tmp_path, quant.double_rounding(BITS), quant.lsq_activation(BITS), 4
  )
  state = files.load_file(tmp_path / "plain")
  layers = read(tmp_path / "plain")[1]["layers"]
  functional = torch.nn.functional

  def operands(name, x):
    scale, ends = state[f"{name}.input_scale"], layers[name]["input_codes"]
    x = torch.clamp(torch.round(x * (1 / scale)), *ends) * scale
    weight = state[f"{name}.weight"].float()
    scale = state[f"{name}.weight_scale"]
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return x, weight * scale, state[f"{name}.bias"]

  y = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
  y = functional.conv2d(*operands("conv", y), padding=1, groups=2)
  norm = torch.nn.BatchNorm2d(6, eps=0.0).eval()
  keys = ("weight", "bias", "running_mean", "running_var")
  norm.load_state_dict({k: state[f"norm.{k}"] for k in keys}, strict=False)
  y = torch.relu(norm(y)).mean((2, 3))
  y = functional.linear(*operands("head", y))
  # Sums of another order.
  np.testing.assert_allclose(
    y.detach().numpy(), network(x), rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  ("weight", "dtype", "values"),
  [
    (quant.ternary(), np.int8, [-1, 0, 1]),
    (quant.binary(), np.int8, [-1, 1]),
    (quant.adabits((2,), scheme="centered"), np.int8, [-3, -1, 1, 3]),
    (quant.lsq((8, 2), per_channel=False), np.int8, [-2, -1, 0, 1]),
  ],
  ids=lambda value: getattr(value, "name", None),
)
def test_integers_are_those_of_the_method(tmp_path, weight, dtype, values):
  network, _ = plain(tmp_path, weight)
  tensors, about = read(tmp_path / "plain")
  codes = tensors["head.weight"]
  assert codes.dtype == dtype and set(np.unique(codes)) <= set(values)
  got = codes.astype(np.float32) * tensors["head.weight_scale"][:, None]
  np.testing.assert_allclose(got.T, network.head.kernel, rtol=1e-6)
  assert "head.input_scale" not in tensors
  assert about["layers"]["head"]["input_codes"] is None


def test_integers_that_need_more_than_eight_bits_have_sixteen(tmp_path):
  plain(tmp_path, quant.adabits((8, 4), scheme="centered"), bits=8)
  codes = read(tmp_path / "plain")[0]["conv.weight"]
  assert codes.dtype == np.int16 and abs(codes).max() > 128


@pytest.mark.parametrize(
  ("weight", "activation", "message"),
  [
    (quant.term_quantization((8, 4)), None, "method term_quantization has no"),
    (
      quant.lsq_plus((8, 4)),
      quant.lsq_plus_activation((8, 4)),
      "activation lsq_plus_activation has no integers to export",
    ),
    (
      quant.double_rounding((8, 4)),
      quant.dynamic_activation((8, 4)),
      "activation dynamic_activation has no scale to export",
    ),
  ],
  ids=["weight", "activation", "scale"],
)
def test_a_method_without_integers_or_a_scale_is_named(
  tmp_path, weight, activation, message
):
  with pytest.raises(ValueError, match=message):
    plain(tmp_path, weight, activation)
  assert not (tmp_path / "plain").exists()


def test_wrong_bits_and_existing_paths_are_errors(artifact, tmp_path):
  with pytest.raises(ValueError, match=r"must be one of \(8, 6, 4, 2\), got 3"):
    export_safetensors(tmp_path / "plain", artifact, bits=3)
  with pytest.raises(ValueError, match="missing layers .*'stage1/block0/conv1"):
    export_safetensors(tmp_path / "plain", artifact, bits={"x": 4})
  with pytest.raises(
    ValueError, match="what deploy.open returned, got 'model'"
  ):
    export_safetensors(tmp_path / "plain", "model", bits=4)
  assert not list(tmp_path.iterdir())
  (tmp_path / "plain").touch()
  with pytest.raises(FileExistsError, match="plain exists already"):
    export_safetensors(tmp_path / "plain", artifact, bits=4)


def test_an_artifact_of_which_a_part_was_read_gives_the_same_file(tmp_path):
  weight = quant.double_rounding(BITS, rounding="half_up")
  small_artifact.save(tmp_path / "model", weight=weight)
  part = deploy.open(tmp_path / "model", 4)
  export_safetensors(tmp_path / "whole", deploy.open(part.path), bits=6)
  for name, bits in (("lower", 2), ("higher", 6)):
    export_safetensors(tmp_path / name, part, bits=bits)
  assert not part.holds(6)
  jax.tree.map(
    np.testing.assert_array_equal,
    read(tmp_path / "higher"),
    read(tmp_path / "whole"),
  )


def test_two_arrays_of_one_name_are_an_error(tmp_path):
  class Clash(nnx.Module):
    def __init__(self):
      self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
      self.layer.weight = nnx.Param(jnp.zeros(3))

    def __call__(self, x):
      return self.layer(x)

  network = nn.quantize(
    Clash(),
    weight=quant.double_rounding((8, 4)),
    sample=jnp.ones((1, 4)),
    skip=(),
  )
  deploy.save(tmp_path / "model", network)
  artifact = deploy.open(tmp_path / "model")
  with pytest.raises(ValueError, match="two arrays .* the name layer.weight"):
    export_safetensors(tmp_path / "plain", artifact, bits=4)


def test_half_precision_floats_stay_what_they_are(tmp_path):
  model = nnx.Sequential(
    nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
    nnx.Linear(
      4, 4, param_dtype=jnp.bfloat16, dtype=jnp.float32, rngs=nnx.Rngs(0)
    ),
  )
  weight = quant.double_rounding((8, 4))
  network = nn.quantize(
    model, weight=weight, sample=images(1)[:, 0, 0, [0] * 4], skip="layers/1"
  )
  deploy.save(tmp_path / "model", network)
  artifact = deploy.open(tmp_path / "model")
  export_safetensors(tmp_path / "plain", artifact, bits=4)
  header = (tmp_path / "plain").read_bytes()[8:]
  header, _ = json.JSONDecoder().raw_decode(header.decode(errors="ignore"))
  assert header["layers.1.weight"]["dtype"] == "BF16"
