"""Tests of `python -m dr_jax.inspect`, in this process."""

import os
import re
import sys
import types
import warnings

import jax.numpy as jnp
import pytest
from flax import nnx

from dr_jax import allocate, deploy, inspect, models, nn, quant
from dr_jax.deploy.artifact import inspection
from dr_jax.runtime import command

OPTIONS = {"depth": 8, "num_classes": 3, "channels": 1, "widths": (2, 2, 3)}


@pytest.fixture(scope="module")
def network():
  return nn.quantize(
    models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS),
    weight=quant.double_rounding((8, 4), rounding="half_up"),
    sample=jnp.ones((2, 8, 8, 1)),
  )


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
  path = tmp_path_factory.mktemp("inspection") / "model"
  deploy.save(path, network, architecture=("resnet", OPTIONS))
  return path


@pytest.fixture
def shown(capsys, monkeypatch):
  """Runs the command; returns its exit code and what it printed."""
  monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

  def run(*paths, bits=None):
    monkeypatch.setattr(inspect, "_BITS", types.SimpleNamespace(value=bits))
    with pytest.raises(SystemExit) as ended:
      command.reporting(inspect.inspect, "ARTIFACT")(
        ["inspect", *map(str, paths)]
      )
    return ended.value.code, *capsys.readouterr()

  return run


def cells(text, first):
  """The cells of the line of a table that begins so."""
  (line,) = (line for line in text.splitlines() if line.startswith(first))
  return re.split(r"  +", line)


def test_it_prints_layers_sizes_metadata_and_verified_checksums(
  shown, saved, network
):
  code, out, err = shown(saved)
  assert (code, err) == (0, "")
  artifact = deploy.open(saved)
  for row in nn.layer_table(network):
    size = artifact.layer_bytes[row.name][8]
    assert cells(out, row.name) == [
      *(row.name, "8", row.kind, "x".join(map(str, row.shape))),
      *(f"{row.parameters:,}", f"{row.macs:,}", "float", f"{size:,}"),
    ]
  for bits in (8, 4):
    copy, read = artifact.bytes_at(bits), artifact.bytes_read_at(bits)
    weights = sum(row[bits] for row in artifact.layer_bytes.values())
    assert cells(out, f"{bits} ") == [
      *(str(bits), f"{copy:,}", f"{read:,}", f"{weights:,}")
    ]
  assert cells(out, "format") == ["format", "dr_jax version 3"]
  assert "double_rounding(bits=[8, 4], rounding='half_up'" in out
  assert "resnet(depth=8, num_classes=3" in out
  count = len(artifact.store.ranges)
  assert (
    f"checksums  OK: manifest, header, all whole tensors, {count} of" in out
  )
  assert f"{artifact.manifest['sha256']} (of header and whole tensors)" in out


def test_the_contents_are_all_bytes_of_both_files(saved):
  artifact = deploy.open(saved)
  assert sum(inspection.contents(artifact).values()) == artifact.stored_bytes


def test_bits_are_read_alone(shown, saved):
  artifact = deploy.open(saved, 4)
  code, out, _ = shown(saved, bits="4")
  read, count = len(artifact.store.pieces), len(artifact.store.ranges)
  assert code == 0
  assert f"{read} of {count} pieces; the others were not read" in out
  for layer, sizes in artifact.layer_bytes.items():
    assert cells(out, layer)[1] == "4"
    assert cells(out, layer)[-1] == f"{sizes[4]:,}"


def test_an_allocation_has_its_own_line_of_sizes(shown, saved, tmp_path):
  names = [layer["name"] for layer in deploy.open(saved).manifest["layers"]]
  bits = {name: (8, 4)[i % 2] for i, name in enumerate(names)}
  allocate.Allocation(bits).save(tmp_path / "bits.json")
  _, out, _ = shown(saved, bits=str(tmp_path / "bits.json"))
  artifact = deploy.open(saved, bits)
  assert cells(out, "as above")[1:3] == [
    f"{artifact.bytes_at(bits):,}",
    f"{artifact.read_bytes:,}",
  ]


def test_without_an_architecture_it_names_no_kinds(shown, network, tmp_path):
  deploy.save(tmp_path / "model", network)
  code, out, err = shown(tmp_path / "model")
  assert (code, err) == (0, "")
  assert "\narchitecture" not in out and " conv " not in out
  assert cells(out, "stage1/block0/conv1")[1:3] == ["8", "3x3x2x2"]


def test_a_damaged_piece_is_named(shown, network, tmp_path):
  deploy.save(tmp_path / "model", network)
  store = deploy.open(tmp_path / "model").store
  start, *_ = store.ranges["planes/6", "stage2/block0/conv2"]
  with open(store.path, "r+b") as file:
    old = os.pread(file.fileno(), 1, start)
    os.pwrite(file.fileno(), bytes([old[0] ^ 1]), start)
  assert shown(tmp_path / "model") == (
    2,
    "",
    f"error: {store.path}: planes/6 is damaged: the checksum of "
    "stage2/block0/conv2 differs\n",
  )
  # What 4 bits need is intact.
  assert shown(tmp_path / "model", bits="4")[0] == 0


@pytest.mark.parametrize(
  ("name", "bits", "message"),
  [
    ("nowhere", None, "nowhere/manifest.json: No such file"),
    ("folder", None, "folder/manifest.json: No such file"),
    ("file", None, "file/manifest.json: Not a directory"),
    ("other", None, "other/manifest.json: "),
    ("model", "3", "bits must be one of (8, 4), got 3"),
    ("model", "four", "--bits must be a bit-width or a file of an allocation"),
    ("model", "", "or a file of an allocation, got ''"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(
  shown, saved, tmp_path, name, bits, message
):
  (tmp_path / "folder").mkdir()
  (tmp_path / "file").write_text("text")
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "manifest.json").write_text('{"format": "gguf"}')
  path = saved if name == "model" else tmp_path / name
  code, out, err = shown(path, bits=bits)
  assert (code, out) == (2, "")
  assert err.startswith("error: ") and err.count("\n") == 1
  assert message in err


def test_a_missing_argument_is_named(shown):
  assert shown() == (
    2,
    "",
    "error: arguments must be ARTIFACT and flags, --name=value, got no "
    "ARTIFACT\n",
  )


def test_a_closed_pipe_has_the_code_of_a_broken_pipe(shown, saved, monkeypatch):
  monkeypatch.setattr(inspect, "_BITS", types.SimpleNamespace(value=None))
  monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
  reading, writing = os.pipe()
  os.close(reading)
  with open(writing, "w") as broken, monkeypatch.context() as patch:
    patch.setattr(sys, "stdout", broken)
    with pytest.raises(SystemExit, match="141"):
      command.reporting(inspect.inspect, "ARTIFACT")(["inspect", str(saved)])
