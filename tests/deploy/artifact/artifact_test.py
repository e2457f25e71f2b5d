"""Tests of the integer artifact."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dr_jax import deploy, models, nn, quant

OPTIONS = {
  "depth": 8,
  "num_classes": 5,
  "channels": 1,
  "widths": (4, 6, 8),
}
METHODS = {
  "half_even": quant.double_rounding((8, 6, 4, 2)),
  "floor": quant.double_rounding((8, 5, 3), rounding="floor"),
  "per_tensor": quant.double_rounding((7, 2), per_channel=False),
  "four_bits": quant.double_rounding((4, 3, 2), rounding="half_up"),
  "bit_mixer": quant.bit_mixer((8, 4, 2)),
  "lsq": quant.lsq((8, 4)),
  "lsq_single": quant.lsq((4,)),
}


def _images(seed=1, size=6):
  return jax.random.normal(jax.random.key(seed), (size, 8, 8, 1))


# Another option of the same method.
SLOW = ("bit_mixer", "floor", "per_tensor", "four_bits", "lsq", "lsq_single")


@pytest.fixture(
  scope="module",
  params=[
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in METHODS
  ],
)
def exported(request, tmp_path_factory):
  """A quantized network with uneven statistics, and its artifact."""
  weight = METHODS[request.param]
  network = nn.quantize(
    models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS),
    weight=weight,
    activation=quant.lsq_activation(weight.bits),
    sample=_images(0),
  )
  for bits in weight.bits:
    nn.set_bits(network, bits)
    nn.recalibrate(network, [_images(bits)])
  path = tmp_path_factory.mktemp("artifact") / "model"
  deploy.save(path, network, architecture=("resnet", OPTIONS))
  return network, path


def test_every_bit_width_from_the_stored_integers_equals_the_trained_model(
  exported,
):
  network, path = exported
  loaded = deploy.load(path)
  trained, stored = nn.functional(network), nn.functional(loaded)
  for index in range(len(nn.candidates(network))):
    expected, _ = jax.jit(trained.apply)(
      trained.params, trained.batch_stats, index, _images()
    )
    got, _ = jax.jit(stored.apply)(
      stored.params, stored.batch_stats, index, _images()
    )
    # Kernels are equal to the bit; a norm is folded before and not inside
    # the program, which may move the last bit of a logit.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_kernels_are_equal_bit_for_bit_at_every_bit_width(exported):
  network, path = exported
  loaded = deploy.load(path)
  layers = nn.quantized.quantized_layers(network)
  stored = nn.quantized.quantized_layers(loaded)
  for index, bits in enumerate(nn.candidates(network)):
    nn.set_bits(loaded, bits)
    for name, layer in layers.items():
      expected = layer.weight_quantizer.fake_quantize(
        nn.bits.arrays_of(layer.weight_params), layer.kernel[...], index
      )
      np.testing.assert_array_equal(stored[name].kernel, expected)


def test_a_loaded_model_computes_with_the_backend_asked_for(exported):
  _, path = exported
  stored = deploy.load(path, backend="carrier")
  np.testing.assert_allclose(
    stored(_images()), deploy.load(path)(_images()), rtol=1e-4, atol=1e-4
  )
  with pytest.raises(ValueError, match="backend must be one of"):
    deploy.load(path, backend="int3")


def test_a_printed_artifact_is_a_line_without_arrays(exported):
  _, path = exported
  printed = repr(deploy.open(path))
  assert "opened=" in printed and "\n" not in printed
  assert "manifest=" not in printed and "parts=" not in printed


def test_per_layer_bits_work_on_a_loaded_model(exported):
  network, path = exported
  bits = nn.candidates(network)
  assignment = {
    row.name: bits[i % len(bits)]
    for i, row in enumerate(nn.layer_table(network))
  }
  loaded = deploy.load(path, bits=assignment)
  assert {row.name: row.bits for row in nn.layer_table(loaded)} == assignment
  nn.set_bits(network, assignment)
  network.eval()
  np.testing.assert_allclose(
    loaded(_images()), network(_images()), rtol=1e-5, atol=1e-5
  )


def test_integer_methods_store_no_float_kernel(exported):
  network, path = exported
  weight = next(iter(nn.quantized.quantized_layers(network).values()))
  weight = weight.weight_quantizer
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  rows, stored = nn.layer_table(network), weight.stored_bits
  if stored == 32:
    floats = sum(row.parameters for row in rows)
    assert tensors["layers/weight"].nbytes == 4 * floats
    return
  assert "layers/weight" not in tensors
  planes = [f"planes/{p}" for p in range(stored)]
  if weight.storage.planes:
    size = sum(quant.packed_size(row.parameters, 1) for row in rows)
    assert [tensors[name].nbytes for name in planes] == [size] * stored
  else:
    size = sum(quant.packed_size(row.parameters, stored) for row in rows)
    assert tensors["layers/codes"].nbytes == size
    assert not any(name in tensors for name in planes)


def test_sizes_count_codes_at_each_bit_width(exported):
  network, path = exported
  artifact = deploy.open(path)
  layers, bits = artifact.layer_bytes, nn.candidates(network)
  assert artifact.bits == bits
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  checksums = [t.nbytes for key, t in tensors.items() if "checksums" in key]
  total = sum(t.nbytes for t in tensors.values()) - sum(checksums)
  assert artifact.tensor_bytes == total
  stored = nn.layer_table(network)
  assert list(layers) == [row.name for row in stored]
  main = sum(t.nbytes for key, t in tensors.items() if is_main(key))
  for b in bits:
    codes = sum(quant.packed_size(row.parameters, b) for row in stored)
    assert artifact.bytes_at(b) == total - main + codes
  assert sum(layer["stored"] for layer in layers.values()) == main + sum(
    t.nbytes for key, t in tensors.items() if key == "layers/scale"
  )


def is_main(key):
  """Whether a tensor holds what is quantized, and no scales."""
  return key in ("layers/codes", "layers/weight") or key.startswith("planes/")


def test_norms_of_pairs_come_back_at_every_assignment(tmp_path):
  bits = (8, 4, 2)
  network = nn.quantize(
    models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS),
    weight=quant.double_rounding(bits),
    activation=quant.lsq_activation(bits),
    sample=_images(0),
    norm="transitional",
  )
  # As if trained: every row has different numbers.
  rng = np.random.default_rng(0)
  rows = nnx.state(network, nnx.Any(nn.NormParam, nnx.BatchStat))
  for _, variable in nnx.to_flat_state(rows):
    value = rng.uniform(0.5, 1.5, variable.shape)
    variable[...] = jnp.asarray(value, jnp.float32)
  nnx.update(network, rows)
  deploy.save(tmp_path / "model", network, architecture=("resnet", OPTIONS))
  artifact = deploy.open(tmp_path / "model")
  norms = artifact.parts.norms
  # The shortcut is called before the two convolutions of its block.
  assert norms["stage2/block0/norm2"].orders == (2, 3)
  assert norms["stage1/block0/norm1"].orders == (0,)
  assert norms["stage2/block0/norm2"].gain.shape == (9, 6)
  trained = nn.functional(network)
  stored = nn.functional(deploy.load(tmp_path / "model"))

  @jax.jit
  def run(index):
    return [
      split.apply(split.params, split.batch_stats, index, _images())[0]
      for split in (trained, stored)
    ]

  for index in rng.integers(0, 3, (20, trained.layers)):
    expected, got = run(jnp.asarray(index, jnp.int32))
    # A folded norm may move the last bit of a logit.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_one_flipped_byte_is_found_and_the_file_named(
  exported, tmp_path, name, place
):
  path = tmp_path / "model"
  shutil.copytree(exported[1], path)
  data = bytearray((path / name).read_bytes())
  data[int(place * len(data))] ^= 1
  (path / name).write_bytes(data)
  with pytest.raises(deploy.ArtifactError, match=name):
    deploy.load(path)


def test_missing_and_foreign_files_are_named(exported, tmp_path):
  with pytest.raises(deploy.ArtifactError, match="manifest.json: No such file"):
    deploy.load(tmp_path / "nothing")
  path = tmp_path / "model"
  shutil.copytree(exported[1], path)
  (path / "model.safetensors").unlink()
  with pytest.raises(deploy.ArtifactError, match="safetensors: No such file"):
    deploy.load(path)
  manifest = json.loads((path / "manifest.json").read_text())
  (path / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
  with pytest.raises(
    deploy.ArtifactError, match="must have format .* got .* version 99"
  ):
    deploy.load(path)


def test_another_network_raises_an_error(exported):
  other = models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS | {"depth": 14})
  with pytest.raises(deploy.ArtifactError, match="not among what was stored"):
    deploy.load(exported[1], model=other)
  wide = models.build(
    "resnet", rngs=nnx.Rngs(0), **OPTIONS | {"widths": (4, 6, 10)}
  )
  with pytest.raises(deploy.ArtifactError, match="not in this network"):
    deploy.load(exported[1], model=wide)


def test_nothing_is_overwritten(exported):
  network, path = exported
  before = (path / "model.safetensors").read_bytes()
  with pytest.raises(
    FileExistsError, match="exists already; choose a new path"
  ):
    deploy.save(path, network)
  assert (path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("bits", [9, 4.0, True, np.array([8, 4])])
def test_bits_that_are_not_candidates_raise_an_error(bits, exported):
  for call in (deploy.open, deploy.load):
    with pytest.raises(ValueError, match="bits.* must be (one of|an integer)"):
      call(exported[1], bits=bits)


class Half(nnx.Module):
  """Parameters in bfloat16."""

  def __init__(self, rngs):
    make = functools.partial(nnx.Linear, param_dtype=jnp.bfloat16, rngs=rngs)
    self.first, self.middle, self.last = make(6, 5), make(5, 5), make(5, 3)

  def __call__(self, x):
    return self.last(nnx.relu(self.middle(nnx.relu(self.first(x)))))


@pytest.fixture
def mixed_dtypes():
  """Layers of bfloat16 parameters take float32 inputs, as Flax lets them."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def _half():
  x = jax.random.normal(jax.random.key(0), (4, 6))
  model = nn.quantize(
    Half(nnx.Rngs(0)),
    weight=quant.double_rounding((8, 2)),
    activation=quant.lsq_activation((8, 2)),
    sample=x,
  )
  return model, x


@pytest.mark.usefixtures("mixed_dtypes")
def test_bfloat16_parameters_come_back_as_they_were(tmp_path):
  model, x = _half()
  deploy.save(tmp_path / "model", model)
  loaded = deploy.load(tmp_path / "model", model=Half(nnx.Rngs(1)))
  assert loaded.first.kernel.dtype == jnp.bfloat16
  np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.usefixtures("mixed_dtypes")
def test_a_loaded_network_is_not_saved_again(tmp_path):
  deploy.save(tmp_path / "model", _half()[0])
  loaded = deploy.load(tmp_path / "model", model=Half(nnx.Rngs(1)))
  with pytest.raises(
    ValueError, match="layer middle holds stored codes; pass what"
  ):
    deploy.save(tmp_path / "again", loaded)
  with pytest.raises(
    ValueError, match="model must have a batch norm that collects"
  ):
    nn.recalibrate(loaded, [jnp.ones((2, 6))])


@pytest.mark.usefixtures("mixed_dtypes")
def test_a_kernel_that_a_float_layer_shares_is_an_error(tmp_path):
  model, _ = _half()
  model.middle.kernel = model.first.kernel = nnx.Param(jnp.ones((6, 6)))
  with pytest.raises(
    ValueError, match="layer first stays float and shares the kernel of"
  ):
    deploy.save(tmp_path / "model", model)
  assert not (tmp_path / "model").exists()


def test_a_network_that_is_one_layer_stores_its_codes_only(tmp_path):
  layer = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (4, 6))
  model = nn.quantize(
    layer, weight=quant.double_rounding((8, 2)), sample=x, skip=()
  )
  deploy.save(tmp_path / "model", model)
  tensors = safetensors.numpy.load_file(tmp_path / "model/model.safetensors")
  assert set(tensors) == {"layers/codes", "layers/scale", "float/bias"}
  loaded = deploy.load(tmp_path / "model", model=layer)
  np.testing.assert_array_equal(loaded(x), model(x))


class Inner(nnx.Module):
  """Its class has the name of one of its layers."""

  def __init__(self, rngs):
    self.first = nnx.Linear(6, 6, rngs=rngs)
    self.inner = nnx.Linear(6, 6, rngs=rngs)
    self.last = nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, x):
    return self.last(self.inner(self.first(x)))


def test_a_layer_may_have_the_name_of_its_model(tmp_path):
  x = jax.random.normal(jax.random.key(0), (4, 6))
  model = nn.quantize(
    Inner(nnx.Rngs(0)), weight=quant.double_rounding((8, 2)), sample=x
  )
  neighbor = tmp_path / "model.partial"
  neighbor.mkdir()
  deploy.save(tmp_path / "model", model)
  loaded = deploy.load(tmp_path / "model", model=Inner(nnx.Rngs(1)))
  np.testing.assert_array_equal(loaded(x), model(x))
  assert sorted(tmp_path.iterdir()) == [tmp_path / "model", neighbor]


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenetv2"])
def test_all_variables_of_a_network_are_among_its_parts(name):
  # `load` builds networks without values: no state of dropout may be left out.
  model = nnx.eval_shape(
    lambda: models.build(name, num_classes=2, rngs=nnx.Rngs(0))
  )
  assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
