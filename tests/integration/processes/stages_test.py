"""Stages beside plain training, over real processes on loopback."""

import json
import re

import loopback
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image


def run(count, config, flags, workdir, *, devices=1, timeout=120):
  """What `count` processes said of a run that ended well."""
  command = ("-m", "dr_jax.main", f"--config={config}", *flags)
  command = (*command, f"--workdir={workdir}")
  with loopback.started([command] * count, devices=devices) as running:
    codes, said = loopback.finish(running, timeout=timeout)
  assert codes == [0] * count, said
  return said


# Two bit-widths at once, from a float network without training, in 9 steps.
BITS = (
  "--config.stages=('multi_precision',)",
  "--config.model.options.widths=(4, 4, 4)",
  "--config.quant.bits=(8, 4)",
  "--config.train.epochs=1",
  "--config.train.schedule=accumulate",
  "--config.train.vectorize=vmap",
  "--config.log_every=1",
)


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("bits") / "run"
  run(1, "configs/digits.py", BITS, workdir)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2], ids=["across", "within"])
def test_bit_widths_over_processes_or_in_each_train_as_in_one(
  one_after_the_other, tmp_path, devices
):
  """With a device each, processes share no batch, but the bit-widths."""
  flags = (*BITS, "--config.devices.bits=2")
  workdir = tmp_path / "run"
  run(2, "configs/digits.py", flags, workdir, devices=devices)
  expected = loopback.losses(one_after_the_other, "multi_precision")
  found = loopback.losses(workdir, "multi_precision")
  assert len(found) == len(expected) == 18
  # Before anything was rounded the same sums; later a last bit can move a
  # value to the next code.
  np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-5)
  np.testing.assert_allclose(found, expected, rtol=2e-2)


MIXED = (
  "--config.model.options.depth=8",
  "--config.model.options.widths=(2, 3, 4)",
  "--config.quant.bits=(8, 4, 2)",
  "--config.pretrain.epochs=2",
  "--config.train.epochs=2",
  "--config.supernet.epochs=2",
  "--config.checkpoint_every=10",
  "--config.hessian.max_probes=8",
  "--config.search.strategies=('hessian_ilp', 'uniform')",
  "--config.search.budgets=(3.0, 5.0)",
)


def files(workdir):
  """Names of artifacts, without the fingerprints of trained networks."""
  return {
    re.sub(r"_[0-9a-f]{8}\.", ".", str(path.relative_to(workdir)))
    for path in workdir.rglob("*")
    if path.is_file() and "checkpoints" not in path.parts
  }


@pytest.mark.slow
def test_a_mixed_precision_job_of_two_processes_ends_as_that_of_one(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  config = "configs/digits_mixed.py"
  run(1, config, MIXED, one, timeout=300)
  said = run(2, config, MIXED, two, timeout=300)
  assert ["hessian_ilp" in text for text in said] == [True, False]
  assert files(two) == files(one)
  results = {
    stage: [
      json.loads((place / stage / "result.json").read_text())
      for place in (one, two)
    ]
    for stage in ("pretrain", "hessian", "search", "export")
  }
  # Float sums in another order; the same probes of nearly the same network.
  a, b = (x["scores"]["float"]["loss"] for x in results["pretrain"])
  assert b == pytest.approx(a, rel=1e-4)
  a, b = (x["traces"] for x in results["hessian"])
  assert list(a) == list(b)
  for name in a:
    assert b[name]["mean"] == pytest.approx(a[name]["mean"], rel=1e-3)
  # Rounded weights move by a code, scores with them, so a search can find
  # others; what it promises holds.
  _, found = results["search"]
  assert len(found["rows"]) == 4
  for row in found["rows"]:
    for cost, budget in row["budgets"].items():
      assert row["cost"][cost] <= budget
  a, b = results["export"]
  for size in ("bytes_at", "stored_bytes", "tensor_bytes", "float_bytes"):
    assert b[size] == a[size]
  for bits, score in a["scores"].items():
    assert b["scores"][bits]["loss"] == pytest.approx(score["loss"], rel=0.1)
  shapes = [
    {
      name: (tensor.dtype, tensor.shape)
      for name, tensor in safetensors.numpy.load_file(
        place / "export" / "model" / "model.safetensors"
      ).items()
    }
    for place in (one, two)
  ]
  assert shapes[0] == shapes[1]


IMAGES = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({values!r})
"""


@pytest.mark.slow
def test_the_first_process_counts_what_no_process_could_read(tmp_path):
  """One epoch of 24 images: each process draws half, one unreadable each."""
  random = np.random.default_rng(0)
  for split, count in (("train", 12), ("test", 4)):
    for kind in ("cat", "horse"):
      directory = tmp_path / "images" / split / kind
      directory.mkdir(parents=True)
      for number in range(count):
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{number:02}.png")
  for name in DAMAGED:
    file = tmp_path / "images" / "train" / name
    file.write_bytes(file.read_bytes()[:60])
  config = tmp_path / "config.py"
  values = {
    "stages": ("pretrain",),
    "data": {"name": "folder", "path": str(tmp_path / "images"),
             "batch_size": 8, "on_decode_error": "skip"},
    "model": {"name": "resnet", "options": {"depth": 8, "widths": (4, 4, 4)}},
    "pretrain": {"epochs": 1, "learning_rate": 0.01},
  }  # fmt: skip
  config.write_text(IMAGES.format(values=values))
  said = run(2, config, (), tmp_path / "run")
  named = [text.count(": cannot be read;") for text in said]
  assert named == [1, 1]
  expected = (
    "warning: pretrain: unreadable images: 2; the next readable one took their "
    "place 2 times"
  )
  told = [text.count("unreadable images") for text in said]
  assert (told, expected in said[0]) == ([1, 0], True)


# Of the first epoch's images, one of each process's half.
DAMAGED = ("cat/01.png", "horse/00.png")
