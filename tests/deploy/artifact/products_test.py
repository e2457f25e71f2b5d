"""Artifacts of networks whose products of attention are quantized."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax import export

from dr_jax import deploy, models, nn, quant
from dr_jax.deploy.artifact.manifest import _PRODUCTS
from dr_jax.nn.products import operands_of
from tests.support.artifact_reader import Reader
from tests.support.forged import resign, rewrite

BITS = (8, 4, 2)
OPTIONS = {
  "vocabulary": 7,
  "context": 5,
  "width": 8,
  "depth": 1,
  "heads": 2,
  "kv_heads": 1,
  "hidden": 8,
}
TOKENS = jnp.array([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]], jnp.int32)
README = pathlib.Path(__file__).parents[3] / "dr_jax/deploy/artifact/README.md"


def build():
  return models.build("transformer", rngs=nnx.Rngs(0), **OPTIONS)


@pytest.fixture(scope="module")
def network():
  """Layers of float inputs, products of quantized ones."""
  return nn.quantize(
    build(),
    weight=quant.double_rounding(BITS, rounding="half_up"),
    products=quant.lsq_activation(BITS),
    sample=TOKENS,
    init="mse",
    skip=(),
  )


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
  path = tmp_path_factory.mktemp("products") / "model"
  deploy.save(path, network, architecture=("transformer", OPTIONS))
  return path


@pytest.fixture
def path(network, tmp_path):
  deploy.save(
    tmp_path / "model", network, architecture=("transformer", OPTIONS)
  )
  return tmp_path / "model"


@nnx.jit
def logits(network):
  return network(TOKENS)


def test_every_bit_width_comes_back_bit_for_bit(network, saved):
  stored = deploy.load(saved)
  assert len(dict(operands_of(stored))) == 4
  seen = []
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.set_bits(stored, bits)
    seen.append(logits(stored))
    np.testing.assert_array_equal(seen[-1], logits(network))
    opened = deploy.open(saved, bits).load()
    np.testing.assert_array_equal(logits(opened), seen[-1])
  assert not np.array_equal(seen[0], seen[1])
  names = [row.name for row in nn.layer_table(network)]
  mixed = {name: BITS[i % 2] for i, name in enumerate(names)}
  nn.set_bits(network, mixed)
  nn.set_bits(stored, mixed)
  np.testing.assert_array_equal(logits(stored), logits(network))


def test_skipped_products_are_not_stored(tmp_path):
  attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 3, 4))
  network = nn.quantize(
    attention,
    weight=quant.double_rounding((8, 4)),
    products=quant.lsq_activation((8, 4)),
    sample=x,
    skip=("out", "*/scores"),
  )
  deploy.save(tmp_path / "model", network)
  operands = Reader(tmp_path / "model").manifest["operands"]
  assert {*operands} == {"attention_fn/weights", "attention_fn/value"}
  stored = deploy.load(tmp_path / "model", bits=4, model=attention)
  nn.set_bits(network, 4)
  np.testing.assert_array_equal(stored(x), network(x))


def test_the_format_page_is_enough_to_read_them(network, saved):
  page = README.read_text()
  assert all(f"`{field}`" in page for field in (*_PRODUCTS, "operands/KEY"))
  reader = Reader(saved)
  assert reader.manifest["version"] == 4
  names = [row.name for row in nn.layer_table(network)]
  stored = dict(operands_of(network))
  found = reader.manifest["operands"]
  for name, operand in found.items():
    np.testing.assert_array_equal(
      reader.operand_scales(name), stored[name].input_params["scale"][...]
    )
    block = name.split("/attention_fn")[0]
    assert names[operand["follows"]] == f"{block}/value"
    assert operand["signed"] == (not name.endswith("weights"))
  tensors = safetensors.numpy.load_file(saved / "model.safetensors")
  assert tensors["operands/scale"].shape == (len(found) * len(BITS),)


def test_networks_without_products_keep_the_format_that_they_had(tmp_path):
  layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  network = nn.quantize(
    layer, weight=quant.double_rounding(BITS), sample=jnp.ones((1, 3)), skip=()
  )
  deploy.save(tmp_path / "model", network)
  manifest = json.loads((tmp_path / "model/manifest.json").read_text())
  assert manifest["version"] == 3
  assert not {*manifest} & {*_PRODUCTS}


def refused(path, message, model=None):
  with pytest.raises(deploy.ArtifactError, match=message) as error:
    deploy.load(path, model=model)
  assert "\n" not in str(error.value) and str(path) in str(error.value)


QUERY = "blocks/0/attention/attention_fn/query"


def test_manifests_must_say_of_operands_what_there_is(path):
  manifest = json.loads((path / "manifest.json").read_text())
  operands = manifest["operands"]

  def changed(**changes):
    return {"operands": operands | {QUERY: operands[QUERY] | changes}}

  eight = {"name": "lsq_activation", "options": {"bits": [8, 4]}}
  weights = {"name": "lsq", "options": {"bits": list(BITS)}}
  for changes, message in (
    ({"version": 3}, "it must be an object with format, version"),
    ({"version": 5}, "must have format 'dr_jax' version 3 or 4, got .* 5"),
    ({"version": True}, "must have format 'dr_jax' version 3 or 4"),
    ({"operands": {}}, "operands must be an object of operands, not empty"),
    (changed(follows=99), f"operand {QUERY} must follow a layer, one of 9"),
    (changed(follows=-1), "follows must be an integer >= 0"),
    (changed(signed=None), "signed must be true or false"),
    (changed(scale=1), "must be an object with follows, signed"),
    (
      {"operands": operands | {"a\nb": operands[QUERY]}},
      "operand must be 1 to",
    ),
    (
      {"products": eight},
      r"products must have the bits of the method, \(8, 4,",
    ),
    ({"products": weights}, "products must name a ActivationQuantizer"),
    ({"products": None}, "products must be an object with name, options"),
  ):
    resign(path, **manifest | changes)
    refused(path, message)


def test_scales_of_operands_are_checked_as_those_of_inputs(path):
  file = safetensors.numpy.load_file(path / "model.safetensors")
  scale = file["operands/scale"]
  for changed, message in (
    (None, "tensor operands/scale is missing"),
    (scale[:-1], r"tensor operands/scale must be float32 \(12,\), got"),
    (scale.astype(np.int32), "tensor operands/scale must be float32"),
    (np.where(scale == scale[0], np.nan, scale), "scale must be finite"),
    (-scale, "/input/scale must not be negative"),
  ):
    rewrite(path, **{"operands/scale": changed})
    refused(path, message)
  rewrite(path, **{"operands/scale": scale})
  deploy.load(path)
  data = bytearray((path / "model.safetensors").read_bytes())
  place = bytes(data).index(scale.tobytes())
  data[place] ^= 1
  (path / "model.safetensors").write_bytes(data)
  refused(path, "is damaged: its checksum differs")


def test_operands_must_have_a_place_in_the_network(path):
  other = build()
  other.blocks[0].attention.attention_fn = jax.nn.dot_product_attention
  refused(path, "operand blocks/0/.*/key is not in this network", other)


def test_scales_that_no_network_has_are_not_stored(network, tmp_path):
  wrong = nnx.clone(network)
  scale = dict(operands_of(wrong))[QUERY].input_params["scale"]
  scale[...] = jnp.full(scale.shape, jnp.inf)
  with pytest.raises(ValueError, match=f"{QUERY}/input/scale must be finite"):
    deploy.save(tmp_path / "wrong", wrong)
  assert not list(tmp_path.iterdir())


def test_programs_of_one_and_of_all_bits_compute_products(saved, tmp_path):
  network = deploy.load(saved)
  layers = len(nn.layer_table(network))
  for bits in (None, 4):
    folder = tmp_path / str(bits)
    deploy.export_stablehlo(folder, network, TOKENS, bits=bits, batch=2)
    data = (folder / "program.jax_export").read_bytes()
    program = export.deserialize(bytearray(data))
    arrays = safetensors.numpy.load_file(folder / "arrays.safetensors")
    index = [jnp.full(layers, 4, jnp.int32)] if bits is None else []
    nn.set_bits(network, 4)
    np.testing.assert_allclose(
      program.call(arrays, TOKENS, *index),
      logits(network),
      rtol=1e-4,
      atol=1e-5,
    )


def test_plain_files_have_the_scales_of_operands(network, saved, tmp_path):
  file = tmp_path / "plain.safetensors"
  deploy.export_safetensors(file, deploy.open(saved), bits=4)
  with safetensors.safe_open(file, "numpy") as opened:
    about = json.loads(opened.metadata()["operands"])
    scales = {name: opened.get_tensor(f"{name}.input_scale") for name in about}
  for name, operand in operands_of(network):
    if not hasattr(operand, "input_params"):
      continue
    name = name.replace("/", ".")
    assert scales.pop(name) == operand.input_params["scale"][1]
    codes = [0, 15] if name.endswith("weights") else [-8, 7]
    assert about[name] == {"bits": 4, "input_codes": codes}
  assert not scales
