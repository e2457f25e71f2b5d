"""Every method's own training, through the pipeline, shortly."""

import functools
import json

import pytest

from dr_jax import deploy, nn, pipeline
from dr_jax.config import from_dict
from dr_jax.quant import RECIPES
from dr_jax.train import CURRICULA, InterruptedRun


def values(method, **train):
  return {
    "method": method,
    "stages": ("multi_precision", "export"),
    "model": {"name": "resnet", "options": {"depth": 8, "widths": (2, 2, 4)}},
    "data": {"batch_size": 256},
    "devices": {"data": 1},
    "quant": {"bits": RECIPES[method].bits or (8, 4, 2)},
    "train": {"epochs": 3, "vectorize": "sequential", **train},
  }


# Several seconds of training each.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Finished runs, when asked for: method -> workdir, results of stages."""
  place = tmp_path_factory.mktemp("methods")

  @functools.cache
  def run(method):
    workdir = place / method
    return workdir, pipeline.run(from_dict(values(method)), workdir)["stages"]

  return run


def records(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_trains_and_its_artifact_scores_the_same(method, finished):
  """The export stage itself fails unless scores are equal."""
  config = from_dict(values(method))
  workdir, stages = finished(method)
  bits = [str(b) for b in config.quant.bits]
  assert list(stages["export"]["scores"]) == bits
  trained = config.train.curriculum != "post_training"
  assert any(r["name"] == "loss" for r in records(workdir)) == trained
  artifact = deploy.open(workdir / "export" / "model")
  sizes = [artifact.bytes_at(b) for b in artifact.bits]
  assert sizes == sorted(sizes, reverse=True)
  network = artifact.load()
  stored = next(iter(nn.quantized.quantized_layers(network).values()))
  weights = sum(row.parameters for row in nn.layer_table(network))
  layers = artifact.layer_bytes.values()
  # Scales, masks and means of 7 small layers come on top.
  least = weights * stored.weight_quantizer.stored_bits / 8
  found = sum(layer["stored"] for layer in layers)
  if method == "bitwave":
    assert weights * 2 / 8 < found < least + weights / 4 + 400
  else:
    assert least <= found <= least + 600


def test_the_phases_of_bit_mixer_train_in_order(finished):
  workdir, _ = finished("bit_mixer")
  logged = [r for r in records(workdir) if r["name"] == "loss"]
  losses = [(r["stage"], r["bits"]) for r in logged]
  phases = ["float_weights", "quantized_weights", "mixed"]
  assert [p.name for p in CURRICULA["bit_mixer"].phases] == phases
  labels = ["random", "random", "mixed"]
  expected = [
    (f"multi_precision/{phase}", label)
    for phase, label in zip(phases, labels, strict=True)
  ]
  assert list(dict.fromkeys(losses)) == expected
  # A third of three epochs of 1,257 images in batches of 256 each.
  last = {r["stage"]: r["step"] for r in logged}
  assert set(last.values()) == {4}
  manifest = deploy.open(workdir / "export" / "model").manifest
  assert manifest["method"]["name"] == "bit_mixer"


@pytest.mark.parametrize("stop", [2, 6, 10])
def test_a_curriculum_resumes_in_the_phase_where_it_was_stopped(
  stop, finished, tmp_path
):
  config = from_dict(values("bit_mixer"))
  _, whole = finished("bit_mixer")
  steps = iter(range(1, 100))

  def interrupted():
    return "SIGTERM" if next(steps) == stop else None

  with pytest.raises(InterruptedRun, match="SIGTERM after step"):
    pipeline.run(config, tmp_path, interrupted=interrupted)
  parts = pipeline.run(config, tmp_path)["stages"]
  scores = [s["multi_precision"]["scores"] for s in (whole, parts)]
  assert scores[0] == scores[1]
