"""Tests of `python -m dr_jax.export` as a user starts it."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_artifact
import small_language_model
from forked_command import ROOT, ForkedCommand
from jax import export as jax_export

from dr_jax import allocate, deploy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with the artifact of a run, and one without an architecture."""
  folder = tmp_path_factory.mktemp("export")
  small_artifact.save(folder / "model")
  artifact = deploy.open(folder / "model")
  mixed = allocate.Allocation(small_artifact.mixed(artifact))
  mixed.save(folder / "mixed.json")
  allocate.Allocation({"other": 8}).save(folder / "other.json")
  return folder


@pytest.fixture(scope="module")
def command(folder):
  """Runs the command in forks of one process."""
  forked = ForkedCommand(folder, "export")

  def run(output, **flags):
    flags = {"artifact": folder / "model", "output": output} | flags
    given = {k: v for k, v in flags.items() if v is not None}
    return forked(*(f"--{name}={value}" for name, value in given.items()))

  yield run
  forked.close()


STABLEHLO = {"format": "stablehlo", "input_shape": "8,8,1"}


def test_a_program_of_an_allocation_gives_the_logits_of_the_artifact(
  command, folder, tmp_path
):
  bits = folder / "mixed.json"
  ended = command(tmp_path / "program", bits=bits, **STABLEHLO)
  assert (ended.code, ended.err) == (0, "")
  files = [*(tmp_path / "program").iterdir()]
  total = sum(file.stat().st_size for file in files)
  assert ended.out == f"{tmp_path / 'program'}: {total:,} bytes\n"
  network = deploy.load(folder / "model", bits=json.loads(bits.read_text()))
  program = (tmp_path / "program" / "program.jax_export").read_bytes()
  program = jax_export.deserialize(bytearray(program))
  arrays = safetensors.numpy.load_file(
    tmp_path / "program" / "arrays.safetensors"
  )
  images = small_artifact.images(3)
  np.testing.assert_array_equal(
    jax.jit(program.call)(arrays, images), jax.jit(lambda x: network(x))(images)
  )


@pytest.mark.slow
def test_a_program_of_a_language_model_takes_tokens(command, folder, tmp_path):
  small_language_model.save(folder / "language")
  ended = command(
    tmp_path / "program",
    artifact=folder / "language",
    bits=4,
    **STABLEHLO | {"input_shape": "16"},
  )
  assert (ended.code, ended.err) == (0, "")
  about = json.loads((tmp_path / "program" / "program.json").read_text())
  assert about["arguments"][-1]["dtype"] == "int32"


def test_flags_say_batch_and_platforms_of_a_program_of_all_bits(
  command, tmp_path
):
  ended = command(
    tmp_path / "program", bits="all", batch=2, platforms="cpu", **STABLEHLO
  )
  assert (ended.code, ended.err) == (0, "")
  about = json.loads((tmp_path / "program" / "program.json").read_text())
  assert about["bits"] is None and about["platforms"] == ["cpu"]
  assert about["arguments"][-2]["shape"] == [2, 8, 8, 1]


@pytest.mark.parametrize(
  ("bits", "flags", "note"),
  [
    pytest.param("all", {}, "", marks=pytest.mark.slow),
    (
      4,
      {"arithmetic": "fused", "weight_type": "int4"},
      "bits 4: 18 of 18 fused channels are exact\n",
    ),
  ],
)
def test_an_onnx_file_computes_in_onnx_runtime(
  command, folder, tmp_path, bits, flags, note
):
  runtime = pytest.importorskip("onnxruntime")
  flags = {"format": "onnx", "input_shape": "8,8,1", "bits": bits} | flags
  path = tmp_path / "net.onnx"
  ended = command(path, **flags)
  assert (ended.code, ended.err) == (0, "")
  assert ended.out == f"{path}: {path.stat().st_size:,} bytes\n{note}"
  session = runtime.InferenceSession(tmp_path / "net.onnx")
  given = {"input": small_artifact.images(3)}
  if bits == "all":
    given["bits"] = np.array(4)
  (logits,) = session.run(None, given)
  network = deploy.load(folder / "model", bits=4)
  # Sums of another order.
  np.testing.assert_allclose(
    logits, network(given["input"]), rtol=1e-4, atol=1e-4
  )


def test_the_integers_of_an_artifact_are_written_for_pytorch(
  command, folder, tmp_path
):
  ended = command(tmp_path / "plain", format="safetensors", bits=2)
  assert (ended.code, ended.err) == (0, "")
  expected = tmp_path / "expected"
  deploy.export_safetensors(expected, deploy.open(folder / "model"), bits=2)
  got, expected = map(
    safetensors.numpy.load_file, (tmp_path / "plain", expected)
  )
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"bits": 3}, "bits must be one of (8, 6, 4, 2), got 3"),
    ({"bits": "four"}, "--bits must be a bit-width, all, or a file of an"),
    ({"bits": "other.json"}, "unknown layers ['other']"),
    ({"bits": "model/manifest.json"}, "allocation must be a JSON object"),
    ({"bits": None}, "--bits must be set; see --help"),
    ({"format": "tflite"}, "flag --format=tflite: value should be one of"),
    ({"format": "safetensors"}, "--input_shape must come with --format=stable"),
    ({"input_shape": None}, "--input_shape must be the sizes of one input"),
    ({"input_shape": "8,8,3"}, "--input_shape=8,8,3 must fit the network"),
    ({"input_shape": "8,-8,1"}, "--input_shape must be the sizes of one input"),
    ({"format": "onnx", "input_shape": "8,8,3"}, "8,8,3 must fit the network"),
    (
      {"format": "onnx", "input_shape": "999999999999,8,1"},
      "--input_shape=999999999999,8,1 must fit in memory, but: Unable to",
    ),
    ({"format": "onnx", "opset": 3}, "opset must be in 18.."),
    (
      {"format": "onnx", "bits": "all", "weight_type": "int4"},
      "--weight_type must be int8 with --bits=all, got int4",
    ),
    ({"arithmetic": "fused"}, "--arithmetic must come with --format=onnx"),
    ({"platforms": "tpu,vulkan"}, "platforms must be a list of cpu, cuda"),
    ({"artifact": "nowhere"}, "nowhere/manifest.json: No such file"),
    ({"nothing": 1}, "Unknown command line flag 'nothing'"),
  ],
)
def test_what_cannot_be_exported_is_one_line_and_exit_code_2(
  command, folder, tmp_path, flags, message
):
  flags = {
    name: folder / value
    if isinstance(value, str) and re.search(r"\.|nowhere", value)
    else value
    for name, value in flags.items()
  }
  ended = command(tmp_path / "new", **({"bits": 4} | STABLEHLO | flags))
  assert ended.code == 2 and ended.out == ""
  assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
  assert message in ended.err
  assert not list(tmp_path.iterdir())


def test_all_bits_have_no_plain_file(command, tmp_path):
  ended = command(tmp_path / "new", format="safetensors", bits="all")
  assert ended.code == 2
  assert "--bits=all must come with --format=stablehlo or onnx" in ended.err


@pytest.mark.parametrize("format", ["stablehlo", "safetensors"])
def test_an_existing_output_is_left_as_it_is(command, tmp_path, format):
  (tmp_path / "old").write_text("mine")
  flags = STABLEHLO if format == "stablehlo" else {"format": format}
  ended = command(tmp_path / "old", bits=4, **flags)
  assert ended.code == 2
  assert ended.err == (
    f"error: {tmp_path / 'old'} exists already; choose a new path\n"
  )
  assert (tmp_path / "old").read_text() == "mine"


def test_help_shows_an_example():
  shown = subprocess.run(
    [sys.executable, "-m", "dr_jax.export", "--help"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert "python -m dr_jax.export --artifact=" in shown.stdout
  assert "--input_shape" in shown.stdout and not shown.stderr
  assert shown.returncode == 0


def example(number):
  """A Python block of the page on exports."""
  page = (ROOT / "dr_jax/deploy/export/README.md").read_text()
  return re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number]


def test_the_example_of_the_page_runs_a_program(command, tmp_path, monkeypatch):
  assert command(tmp_path / "program", bits=4, **STABLEHLO).code == 0
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(example(0).replace("(5, 32, 32, 3)", "(5, 8, 8, 1)"), names)
  assert names["logits"].shape == (5, 5)


def test_the_example_of_the_page_runs_a_layer_in_pytorch(
  command, folder, tmp_path, monkeypatch
):
  pytest.importorskip("torch", reason="PyTorch is not installed")
  path = tmp_path / "digits_4.safetensors"
  assert command(path, bits=4, format="safetensors").code == 0
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(example(1), names)
  layer = deploy.load(folder / "model", bits=4).stage1.block0.conv1
  expected = np.asarray(layer(np.ones((1, 8, 8, 4), np.float32)))
  # Sums of another order.
  np.testing.assert_allclose(
    names["outputs"].numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5
  )
