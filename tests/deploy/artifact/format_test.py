"""The format in dr_jax/deploy/artifact/README.md, against a file."""

import ast
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dr_jax import deploy, nn, quant
from dr_jax.deploy.artifact.manifest import _MANIFEST
from tests.support.artifact_reader import Reader

ROOT = pathlib.Path(__file__).parents[3]
README = ROOT / "dr_jax/deploy/artifact/README.md"
PAGE = README.read_text().split("\n## Format\n")[1]
WEIGHT = [[2.5, -4.0], [1.5, -0.5], [3.5, 1.0]]


@pytest.fixture
def path(tmp_path):
  """The artifact of the page's example."""
  layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  layer.kernel[...] = jnp.array(WEIGHT)
  network = nn.quantize(
    layer,
    weight=quant.double_rounding((4, 2), rounding="half_up"),
    activation=quant.lsq_activation((4, 2)),
    sample=jnp.ones((1, 3)),
    skip=(),
  )
  network.weight_params["scale"][...] = jnp.full((1, 2), 0.5)
  network.input_params["scale"][...] = jnp.array([0.25, 1.0])
  deploy.save(tmp_path / "model", network)
  return tmp_path / "model"


def test_the_example_has_the_bytes_that_the_page_shows(path):
  data = (path / "model.safetensors").read_bytes()
  begin = 8 + int.from_bytes(data[:8], "little")
  header = json.loads(data[8:begin])
  rows = re.findall(r"^\| `(.*?)` \| (\d+), (\d+) \| `(.*?)`", PAGE, re.M)
  assert list(header) == [name for name, *_ in rows]
  for name, start, end, shown in rows:
    assert header[name]["data_offsets"] == [int(start), int(end)]
    content = data[begin + int(start) : begin + int(end)]
    assert content.hex(" ").startswith(shown)


def test_the_example_has_the_weights_that_the_page_shows(path):
  reader = Reader(path)
  assert reader.weight("linear", 4).tolist() == WEIGHT
  shown = re.search(r"weight at 2 bits is (\[.*?\]\])", PAGE)[1]
  assert reader.weight("linear", 2).tolist() == ast.literal_eval(shown)


def test_every_field_of_the_manifest_is_on_the_page(path):
  (table,) = re.findall(r"(\| field .*?)\n\n", PAGE, re.S)
  listed = re.findall(
    r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.M))
  )
  manifest = json.loads((path / "manifest.json").read_text())
  assert set(listed) == {*manifest} == {*_MANIFEST, "manifest_sha256"}
  for entry in (*manifest["layers"], {"follows": 0, "rows": 0, "channels": 0}):
    assert all(f"`{key}`" in PAGE for key in entry)


def test_the_safetensors_library_reads_the_file(path):
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  reader = Reader(path)
  assert tensors.keys() == reader.tensors.keys()
  for name, array in tensors.items():
    np.testing.assert_array_equal(array, reader.tensor(name))


def test_the_reader_of_the_page_needs_numpy_alone():
  source = (ROOT / "tests/support/artifact_reader.py").read_text()
  imported = {
    alias.name
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Import)
    for alias in node.names
  }
  assert not any(
    isinstance(n, ast.ImportFrom) for n in ast.walk(ast.parse(source))
  )
  assert imported == {"hashlib", "json", "pathlib", "struct", "numpy"}


@pytest.mark.parametrize(
  "dtype", ["bfloat16", "float16", "float8_e4m3fn", "int8", "bool", "uint32"]
)
def test_variables_of_every_dtype_come_back_as_they_were(tmp_path, dtype):
  class Network(nnx.Module):
    def __init__(self):
      self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      self.table = nnx.Variable(jnp.array([[0, 1]], dtype))

    def __call__(self, x):
      return self.layer(x)

  network = nn.quantize(
    Network(),
    weight=quant.double_rounding((4, 2)),
    sample=jnp.ones((1, 3)),
    skip=(),
  )
  deploy.save(tmp_path / "model", network)
  blank = Network()
  blank.table[...] = jnp.zeros_like(blank.table[...])
  table = deploy.load(tmp_path / "model", model=blank).table
  assert table.dtype == dtype and table[...].astype("f4").tolist() == [[0, 1]]


@pytest.fixture
def mixed_dtypes():
  """A norm of bfloat16 statistics takes float32, as Flax lets it."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.mark.usefixtures("mixed_dtypes")
def test_statistics_in_bfloat16_come_back_as_they_were(tmp_path):
  class Network(nnx.Module):
    def __init__(self):
      self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      self.norm = nnx.BatchNorm(2, use_running_average=True, rngs=nnx.Rngs(0))
      for statistic in (self.norm.mean, self.norm.var):
        statistic.set_value(jnp.array([0.5, 3], jnp.bfloat16))

    def __call__(self, x):
      return self.norm(self.layer(x))

  network = nn.quantize(
    Network(),
    weight=quant.double_rounding((4, 2), rounding="floor"),
    sample=jnp.ones((1, 3)),
    skip=(),
  )
  deploy.save(tmp_path / "model", network)
  norm = deploy.open(tmp_path / "model", 2).load(model=Network()).norm
  gain, offset = network.norm.fold()
  assert norm.gain.dtype == gain.dtype == jnp.bfloat16
  np.testing.assert_array_equal(norm.gain[1], gain[1])
  np.testing.assert_array_equal(norm.offset[1], offset[1])
  assert np.isnan(norm.gain[0].astype("f4")).all()


def test_a_layer_whose_inputs_stay_float_stores_no_scales_for_them(tmp_path):
  class Network(nnx.Module):
    def __init__(self):
      rngs = nnx.Rngs(0)
      self.embed = nnx.Embed(6, 4, rngs=rngs)
      self.layer = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens):
      return self.layer(self.embed(tokens))

  model, tokens = Network(), jnp.arange(6)
  network = nn.quantize(
    model,
    weight=quant.double_rounding((4, 2), rounding="floor"),
    activation=quant.lsq_activation((4, 2)),
    sample=tokens,
    skip=(),
  )
  deploy.save(tmp_path / "model", network)
  stored = deploy.load(tmp_path / "model", model=model)
  for bits in (4, 2):
    nn.set_bits(network, bits)
    nn.set_bits(stored, bits)
    np.testing.assert_allclose(
      stored(tokens), network(tokens), rtol=1e-6, atol=1e-6
    )
  reader = Reader(tmp_path / "model")
  assert [x["signed"] for x in reader.manifest["layers"]] == [None, True]
  scales = network.layer.input_params["scale"]
  np.testing.assert_array_equal(reader.input_scales("layer"), scales)
