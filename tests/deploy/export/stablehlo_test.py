"""Tests of exported programs: equal outputs, in a process without dr_jax."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compilation
import safetensors.numpy
import small_artifact
from flax import nnx
from jax import export
from small_artifact import BITS, images

from dr_jax import deploy, nn, quant
from dr_jax.deploy.export.stablehlo import export_stablehlo, inference


def deployed(directory, model, weight, sample, **kwargs):
  """A network as `deploy.load` returns it."""
  network = nn.quantize(model, weight=weight, sample=sample, **kwargs)
  deploy.save(directory / "model", network)
  return deploy.load(directory / "model", model=model)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
  path = tmp_path_factory.mktemp("artifact") / "model"
  with quick_compilation.used():  # nothing is compared with what saved it
    small_artifact.save(path)
  return deploy.open(path)


@pytest.fixture(scope="module")
def network(artifact):
  return artifact.load()


@pytest.fixture(scope="module")
def mixed(artifact):
  return small_artifact.mixed(artifact)


@pytest.fixture(scope="module")
def exported(network, mixed, tmp_path_factory):
  """Directories of a program for each kind of bits."""
  folder = tmp_path_factory.mktemp("programs")
  for name, bits in (("four", 4), ("mixed", mixed), ("all", None)):
    export_stablehlo(folder / name, network, images(1), bits=bits)
  return folder


def run(directory, *inputs):
  program = (directory / "program.jax_export").read_bytes()
  program = export.deserialize(bytearray(program))
  arrays = safetensors.numpy.load_file(directory / "arrays.safetensors")
  return jax.jit(program.call)(arrays, *inputs)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_program_of_one_assignment_equals_the_network_bit_for_bit(
  network, exported, mixed, batch
):
  for name, bits in (("four", 4), ("mixed", mixed)):
    single = nnx.clone(network)
    nn.set_bits(single, bits)
    expected = jax.jit(lambda x, n=single: n(x))(images(batch))
    np.testing.assert_array_equal(run(exported / name, images(batch)), expected)


def test_a_program_of_all_bits_takes_those_of_every_layer(
  network, exported, mixed
):
  function, arrays, bits, layers = inference(network)
  assert bits is None and layers == tuple(mixed)
  for wanted in ([4] * len(layers), [*mixed.values()]):
    wanted = np.array(wanted, np.int32)
    expected = jax.jit(function)(arrays, images(3), wanted)
    got = run(exported / "all", images(3), wanted)
    np.testing.assert_array_equal(got, expected)
  # The program of one assignment is another one: XLA may fuse it differently.
  np.testing.assert_allclose(
    got, run(exported / "mixed", images(3)), rtol=1e-5, atol=1e-5
  )
  assert abs(got - run(exported / "four", images(3))).max() > 0.1


def test_bits_between_candidates_are_read_as_the_next_higher_one(
  network, exported
):
  layers = len(nn.layer_table(network))
  for given, read in ((9, 8), (5, 6), (1, 2)):
    got, expected = (
      run(exported / "all", images(1), np.full(layers, bits, np.int32))
      for bits in (given, read)
    )
    np.testing.assert_array_equal(got, expected)


# What program.json says, and no more; then the same for all bits.
ELSEWHERE = """
import json, os, sys, numpy
for name in ("four", "all"):
  os.chdir(f"{sys.argv[1]}/{name}")
  about = json.load(open("program.json"))
  inputs = {"input0": numpy.load(f"{sys.argv[1]}/images.npy")}
  inputs["bits"] = numpy.full(len(about["layers"]), 2, numpy.int32)
  exec("\\n".join(about["run"]), inputs)
  numpy.save("outputs.npy", inputs["outputs"])
assert "flax" not in sys.modules and "dr_jax" not in sys.modules
"""


def test_a_process_without_dr_jax_computes_the_same_bits(network, exported):
  np.save(exported / "images.npy", images(3))
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  subprocess.run(
    [sys.executable, "-c", ELSEWHERE, str(exported)],
    check=True,
    cwd=exported,
    env=environment,
  )
  bits = np.full(len(nn.layer_table(network)), 2, np.int32)
  four, every = inference(network, 4), inference(network)
  for name, expected in (
    ("four", jax.jit(four.function)(four.arrays, images(3))),
    ("all", jax.jit(every.function)(every.arrays, images(3), bits)),
  ):
    got = np.load(exported / name / "outputs.npy")
    np.testing.assert_array_equal(got, expected)


def test_the_description_lists_the_arguments_in_their_order(
  network, exported, mixed
):
  about = json.loads((exported / "all" / "program.json").read_text())
  arrays = safetensors.numpy.load_file(exported / "all" / "arrays.safetensors")
  listed = {a["name"]: (a["dtype"], a["shape"]) for a in about["arguments"]}
  assert list(listed)[:-2] == sorted(arrays)
  for name, array in arrays.items():
    assert listed[name] == (str(array.dtype), list(array.shape))
  assert listed["input0"] == ("float32", ["batch", 8, 8, 1])
  assert listed["bits"] == ("int32", [len(mixed)])
  assert about["layers"] == list(mixed) and about["candidates"] == [*BITS]
  assert about["platforms"] == ["cpu", "cuda", "tpu"]
  assert about["jax"] == jax.__version__ and about["stablehlo"][0].isdigit()
  about = json.loads((exported / "mixed" / "program.json").read_text())
  assert about["bits"] == mixed


def test_codes_are_stored_at_the_bits_of_their_layer(exported, network, mixed):
  arrays = safetensors.numpy.load_file(
    exported / "mixed" / "arrays.safetensors"
  )
  for row in nn.layer_table(network):
    codes = arrays[f"{row.name}/encoded/codes"]
    assert codes.dtype == np.uint8
    assert codes.nbytes == -(-row.parameters * mixed[row.name] // 8)
    assert f"{row.name}/kernel" not in arrays
  assert arrays["norm/gain"].shape == (1, 8)


@pytest.mark.parametrize(
  ("weight", "stored"),
  [
    # Odd integers of one bit more than the bit-width.
    (quant.adabits((4, 2), scheme="centered"), ("codes", np.uint8, 2)),
    (quant.binary(), ("codes", np.uint8, 1)),
    (quant.term_quantization((8, 4)), ("codes", np.int16, 1)),
    (quant.float_weight((8, 4)), ("weight", np.float32, 1)),
  ],
  ids=lambda value: getattr(value, "name", None),
)
def test_every_method_can_be_exported_whatever_it_stores(
  tmp_path, weight, stored
):
  x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)
  model = nnx.Linear(8, 5, rngs=nnx.Rngs(0))
  network = deployed(tmp_path, model, weight, x, skip=())
  bits = weight.bits[-1]
  export_stablehlo(tmp_path / "program", network, x, bits=bits)
  nn.set_bits(network, bits)
  expected = jax.jit(lambda x: network(x))(x)
  np.testing.assert_array_equal(run(tmp_path / "program", x), expected)


def test_dropout_and_half_precision_parameters_are_exported(tmp_path):
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.Linear(8, 6, rngs=rngs),
    nnx.Dropout(0.5, rngs=rngs),
    nnx.Linear(6, 6, param_dtype=jnp.bfloat16, dtype=jnp.float32, rngs=rngs),
  )
  x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)
  weight = quant.double_rounding((8, 4))
  network = deployed(tmp_path, model, weight, x, skip="layers/2")
  export_stablehlo(
    tmp_path / "program", network, x, batch=3, platforms=("cpu",)
  )
  bits = np.array([8], np.int32)
  got = run(tmp_path / "program", x, bits)
  np.testing.assert_allclose(got, network(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"bits": 3}, r"bits of .* must be one of \(8, 6, 4, 2\), got 3"),
    ({"bits": {"x": 8}}, r"unknown layers \['x'\]"),
    ({"platforms": ("cpu", "vulkan")}, "platforms must be a list of cpu, cuda"),
    ({"platforms": ()}, r"platforms must be a list of .*, got \(\)"),
    ({"platforms": "cpu"}, "platforms must be a list of .*, got 'cpu'"),
    ({"batch": 0}, "batch must be an integer >= 1, got 0"),
    ({"batch": "8"}, "batch must be an integer >= 1, got '8'"),
    ({"sample": np.ones((1, 8, 8, 3))}, r"input \(batch, 8, 8, 3\) must fit"),
    (
      {"sample": np.ones((1, 8))},
      r"input \(batch, 8\) must fit the network, but: conv",
    ),
  ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
  network, tmp_path, options, message
):
  arguments = {"sample": images(1), "bits": 4} | options
  with pytest.raises(ValueError, match=message) as raised:
    export_stablehlo(tmp_path / "program", network, **arguments)
  assert "\n" not in str(raised.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [4, None])
def test_a_network_that_computes_in_integers_is_exported_so(
  network, tmp_path, bits
):
  network = nnx.clone(network)
  nn.set_backend(network, "integer")
  export_stablehlo(
    tmp_path / "program", network, images(1), bits=bits, platforms=("cpu",)
  )
  program = (tmp_path / "program" / "program.jax_export").read_bytes()
  program = export.deserialize(bytearray(program)).mlir_module()
  assert re.search(r"convolution.*xi8>, .*xi8>\) -> .*xi32>", program)
  given = [images(3)]
  if bits is None:
    given.append(np.full(len(nn.layer_table(network)), 4, np.int32))
  nn.set_bits(network, 4)
  np.testing.assert_array_equal(
    run(tmp_path / "program", *given), jax.jit(lambda x: network(x))(given[0])
  )


def test_a_network_of_which_a_part_was_read_is_exported_at_its_bits_alone(
  artifact, network, tmp_path
):
  part = deploy.open(artifact.path, 4).load()
  export_stablehlo(tmp_path / "program", part, images(1), bits=4)
  whole = nnx.clone(network)
  nn.set_bits(whole, 4)
  np.testing.assert_array_equal(
    run(tmp_path / "program", images(2)), jax.jit(lambda x: whole(x))(images(2))
  )
  for bits in (8, None):
    with pytest.raises(ValueError, match="read more with artifact.upgrade"):
      export_stablehlo(tmp_path / "new", part, images(1), bits=bits)


def test_a_network_without_stored_codes_is_refused(tmp_path):
  network = nn.quantize(
    nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
    weight=quant.double_rounding((8, 4)),
    sample=jnp.ones((1, 4)),
    skip=(),
  )
  with pytest.raises(ValueError, match="layer linear must hold stored codes"):
    export_stablehlo(tmp_path / "program", network, jnp.ones((1, 4)), bits=4)


def test_an_existing_path_is_not_overwritten(network, exported):
  with pytest.raises(FileExistsError, match="exists already"):
    export_stablehlo(exported / "four", network, images(1), bits=4)
