"""Artifacts of files that are no files, of any size, with any values."""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dr_jax import deploy, models, nn, quant
from tests.support.forged import resign, rewrite

OPTIONS = {"depth": 8, "num_classes": 3, "channels": 1, "widths": (2, 2, 2)}


@pytest.fixture(scope="module")
def network():
  return nn.quantize(
    models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS),
    weight=quant.double_rounding((8, 4)),
    activation=quant.lsq_activation((8, 4)),
    sample=jnp.ones((2, 8, 8, 1)),
  )


@pytest.fixture
def path(network, tmp_path):
  deploy.save(tmp_path / "model", network, architecture=("resnet", OPTIONS))
  return tmp_path / "model"


def refused(path, message, model=None):
  started = time.process_time()
  with pytest.raises(deploy.ArtifactError, match=message) as error:
    deploy.load(path, model=model)
  assert "\n" not in str(error.value) and str(path) in str(error.value)
  assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_what_is_not_a_regular_file_is_refused_at_once(path, name):
  file = path / name
  file.unlink()
  os.mkfifo(file)
  refused(path, f"{name}: must be a regular file")
  file.unlink()
  file.symlink_to("/dev/zero")
  refused(path, f"{name}: must be a regular file")
  file.unlink()
  file.mkdir()
  refused(path, f"{name}: Is a directory|{name}: must be a regular file")


def test_a_sparse_file_is_not_read(path):
  size = (path / "model.safetensors").stat().st_size
  for larger in (40 * 2**30, 2**30, size + 1):
    os.truncate(path / "model.safetensors", larger)
    refused(
      path, r"safetensors.* must (not be a sparse|have (at most )?\d+ bytes)"
    )
  (path / "model.safetensors").write_bytes(b"")
  os.truncate(path / "model.safetensors", 2**30)
  refused(path, "model.safetensors: must not be a sparse file")
  os.truncate(path / "manifest.json", 2**30)
  refused(path, r"manifest.json: must have at most \d+ bytes, got")


def test_a_sparse_file_whose_header_fits_is_not_read(path):
  file = path / "model.safetensors"
  data = file.read_bytes()
  length = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + length])
  end = len(data) - 8 - length + 2**32
  header["float/x"] = {
    "dtype": "F32",
    "shape": [2**30],
    "data_offsets": [end - 2**32, end],
  }
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
  os.truncate(file, 8 + len(text) + end)
  refused(path, r"model\.safetensors: must (not be a sparse|have at most)")


@pytest.mark.parametrize("text", ["[]", '{"a":1}'])
def test_a_manifest_of_many_parts_is_refused_at_once(path, text):
  repeated = ",".join([text] * (2**22 // (len(text) + 1) - 1))
  (path / "manifest.json").write_text(f"[{repeated}]")
  refused(path, "manifest.json: it must be an object, got")


def test_a_link_to_a_file_is_read(path, tmp_path):
  (path / "model.safetensors").rename(tmp_path / "blob")
  (path / "model.safetensors").symlink_to(tmp_path / "blob")
  assert deploy.load(path)


@pytest.mark.parametrize("bomb", ["[" * 100_000, '{"a":' * 100_000, "[" * 40])
def test_nested_json_is_refused(path, bomb):
  closing = {"[": "]", "{": "}"}[bomb[0]] * bomb.count(bomb[0])
  (path / "manifest.json").write_text(f"{bomb}1{closing}")
  refused(path, "manifest.json: it is nested too deep")


@pytest.mark.parametrize(
  "architecture",
  [
    ("resnet", OPTIONS | {"depth": 6002}),
    ("resnet", OPTIONS | {"depth": 6 * 10**12 + 2}),
    ("resnet", OPTIONS | {"num_classes": 2**33}),
    ("resnet", OPTIONS | {"widths": (2**20, 2**20, 2**20)}),
    ("resnet50", {"num_classes": 3, "channels": 1}),
    ("mobilenetv2", {"num_classes": 3, "channels": 1, "width": 1e9}),
    ("vit", {"depth": 2**14}),
    ("vit", {"depth": 1, "image_size": 2**14, "patch_size": 1}),
    ("transformer", {"depth": 2**16}),
    ("transformer", {"width": 2**16, "hidden": 2**16}),
  ],
)
def test_a_network_larger_than_what_is_stored_is_not_built(path, architecture):
  resign(path, architecture=architecture)
  refused(path, "architecture")


@pytest.mark.parametrize(
  ("architecture", "message"),
  [
    (("resnet", {}), "architecture: options of model 'resnet'"),
    (("resnet", OPTIONS | {"rngs": 3}), "architecture"),
    (("resnet", OPTIONS | {"widths": [2, 2]}), "widths must be three"),
    (("ResNet", OPTIONS), "architecture: name must be one of"),
    (["resnet"], "architecture must be null or a name and its options"),
  ],
)
def test_an_architecture_that_cannot_be_built_is_one_line(
  path, architecture, message
):
  resign(path, architecture=architecture)
  refused(path, message)


def test_a_norm_must_follow_layers_and_have_their_rows(path):
  manifest = json.loads((path / "manifest.json").read_text())
  for change, message in (
    ({"follows": [99]}, "norm norm must follow a layer"),
    ({"follows": [2, 1]}, "norm norm must follow a layer, or it and the one"),
    ({"follows": []}, "follows must be a list of 1 or 2 layers"),
    ({"rows": 3}, "rows of norm norm must be 1 or 2, got 3"),
    ({"channels": 2**40}, "norms/0 must be floats"),
  ):
    norms = manifest["norms"] | {"norm": manifest["norms"]["norm"] | change}
    resign(path, norms=norms)
    refused(path, message)


def test_a_shape_is_bounded_by_the_bytes_that_are_there(path):
  manifest = json.loads((path / "manifest.json").read_text())
  manifest["layers"][0]["shape"] = [3, 3, 2**31, 2]
  resign(path, layers=manifest["layers"])
  refused(path, r"tensor layers/codes must be uint8 \(\d{10,},\), got")


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (np.nan, "must be finite"),
    (np.inf, "must be finite"),
  ],
)
def test_scales_that_no_network_has_are_neither_stored_nor_loaded(
  network, tmp_path, value, message
):
  wrong = nnx.clone(network)
  scale = wrong.stage1.block0.conv1.input_params["scale"]
  scale[...] = jnp.full(scale.shape, value)
  with pytest.raises(ValueError, match=f"conv1/input/scale {message}"):
    deploy.save(tmp_path / "wrong", wrong)
  assert not list(tmp_path.iterdir())


def test_tensors_have_the_dtypes_of_the_network_and_none_is_left_over(path):
  rewrite(path, **{"float/x": np.zeros(1, np.float32)})
  refused(path, r"x float32 \(1,\) was stored and is not in this network")
  rewrite(path, **{"float/x": None, "float/head/bias": np.zeros(3, np.int32)})
  refused(path, r"head/bias float32 \(3,\) is not among what was stored")
  rewrite(path, **{"float/head/bias": np.zeros(3, np.float64)})
  refused(path, "float/head/bias must have at most 32 bits")
  rewrite(path, **{"float/head/bias": np.full(3, np.nan, np.float32)})
  refused(path, "head/bias must be finite")
  rewrite(path, **{"float/head/bias": None, "a\nb": np.zeros(1)})
  refused(path, r"tensor must be 1 to 300 printable characters, got 'a\\nb'")


def test_a_norm_has_the_dtype_of_the_network(path):
  file = safetensors.numpy.load_file(path / "model.safetensors")
  rows = {name: file[name].astype("f2") for name in ("norms/0", "norms/1")}
  rewrite(path, **{"norms/1": rows["norms/1"]})
  refused(path, "tensor norms/1 must be float32, as others, got float16")
  rewrite(path, **rows)
  refused(path, r"norm norm float16 \(2,\) is not in this network")


def test_both_quantizers_have_the_same_bits(path):
  activation = {"name": "lsq_activation", "options": {"bits": [8, 2]}}
  resign(path, activation=activation)
  refused(path, r"activation must have the bits of the method, \(8, 4\), got")


@pytest.mark.parametrize(
  ("weight", "arrays", "message"),
  [
    (quant.lsq((8, 4)), {"scale": np.zeros((2, 1, 3))}, "scale must be in 9.3"),
    (
      quant.double_rounding((8,)),
      {"scale": np.full((1, 3), 1e18)},
      r"got 9.9\d+e\+17",
    ),
    # -2 in two bits, -128 where -127 is the lowest code.
    (quant.ternary(), {"codes": [2] * 5}, r"codes must be in -1\.\.1, got -2"),
    (quant.bit_mixer((8,)), {"codes": [128] * 18}, "codes must be in -127"),
  ],
)
def test_codes_and_scales_are_those_of_the_method(
  tmp_path, weight, arrays, message
):
  layer = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
  model = nn.quantize(layer, weight=weight, sample=jnp.ones((1, 6)), skip=())
  deploy.save(tmp_path / "model", model)
  for name, values in arrays.items():
    dtype = np.uint8 if name == "codes" else np.float32
    array = np.array(values, dtype).reshape(-1)
    rewrite(tmp_path / "model", **{f"layers/{name}": array})
  refused(tmp_path / "model", f"layer linear: .*{message}", layer)


def test_a_learned_scale_below_zero_is_stored_as_it_is_read(network, tmp_path):
  wrong = nnx.clone(network)
  scale = wrong.stage1.block0.conv1.input_params["scale"]
  scale[...] = -scale[...]
  deploy.save(tmp_path / "model", wrong, architecture=("resnet", OPTIONS))
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
  wrong.eval()
  np.testing.assert_allclose(
    deploy.load(tmp_path / "model")(x), wrong(x), rtol=1e-5, atol=1e-5
  )


def test_a_parameter_that_is_nan_is_named_and_not_stored(network, tmp_path):
  wrong = nnx.clone(network)
  wrong.head.bias[...] = jnp.full(3, jnp.nan)
  with pytest.raises(ValueError, match="head/bias must be finite"):
    deploy.save(tmp_path / "model", wrong)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_an_artifact_has_the_permissions_that_the_umask_leaves(
  network, tmp_path, mask
):
  before = os.umask(mask)
  try:
    deploy.save(tmp_path / "model", network)
  finally:
    os.umask(before)
  assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask
  for file in (tmp_path / "model").iterdir():
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_path_may_begin_with_the_home_directory(
  network, tmp_path, monkeypatch
):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  deploy.save("~/model", network, architecture=("resnet", OPTIONS))
  assert deploy.load("~/model") and [p.name for p in tmp_path.iterdir()] == [
    "model"
  ]
