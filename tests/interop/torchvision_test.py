"""Weights with torchvision's names, compared with networks written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from torch_networks import Torch

from dr_jax import models, pipeline
from dr_jax.config import ConfigError, from_dict
from dr_jax.interop.torch import load_weights
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.pretrain import float_network

CASES = {
  "resnet18": (
    {},
    lambda torch, x: torch.resnet(x, (2, 2, 2, 2), False, 64, 1000),
    122,
  ),
  "resnet50": (
    {"width": 8, "num_classes": 7},
    lambda torch, x: torch.resnet(x, (3, 4, 6, 3), True, 8, 7),
    320,
  ),
  "mobilenetv2": (
    {"width": 0.25, "num_classes": 7},
    lambda torch, x: torch.mobilenet(x, 7),
    314,
  ),
}


def images(n=2, size=64):
  draw = np.random.default_rng(1).normal(size=(n, 3, size, size))
  return jnp.asarray(draw.astype(np.float32))


def build(name, **options):
  return models.build(name, rngs=nnx.Rngs(0), **(CASES[name][0] | options))


def logits(model, x):
  """Of NCHW images."""
  model.eval()
  return np.asarray(nnx.jit(lambda m, x: m(x))(model, x.transpose(0, 2, 3, 1)))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
  """A small ResNet18's tensors, and a function that writes some as a file."""
  torch = Torch()
  torch.resnet(images(1, 32), (2, 2, 2, 2), False, 4, 10)
  folder = tmp_path_factory.mktemp("weights")

  def write(name="w", *, without=(), **changed):
    tensors = {
      key: value for key, value in torch.tensors.items() if key not in without
    }
    tensors |= {key.replace("__", "."): value for key, value in changed.items()}
    path = folder / f"{name}.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path

  return torch.tensors, write


def small(**options):
  options = {"width": 4, "num_classes": 10} | options
  return models.build("resnet18", rngs=nnx.Rngs(0), **options)


def arrays(model):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_network_with_torchvisions_weights_gives_torchvisions_logits(
  name, tmp_path
):
  _, reference, count = CASES[name]
  torch, x = Torch(), images()
  expected = np.asarray(reference(torch, x))
  # What torchvision's state_dict() has.
  assert len(torch.tensors) == count
  if name == "mobilenetv2":
    assert torch.highest > 6  # or ReLU would do
  path = tmp_path / "weights.safetensors"
  safetensors.numpy.save_file(torch.tensors, path)
  model = build(name)
  load_weights(model, path)
  # float32 sums in another order, through up to 53 layers.
  np.testing.assert_allclose(
    logits(model, x), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
  )


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_a_network_of_torchvision_itself_gives_the_same_logits(name, tmp_path):
  torch = pytest.importorskip("torch", reason="needs PyTorch")
  torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
  torch.manual_seed(0)
  network = getattr(torchvision.models, name)(num_classes=7)
  with torch.no_grad():
    # Running statistics and scales that are not 0 and 1.
    for key, value in network.state_dict().items():
      if key.endswith(("running_var", "running_mean")) or value.ndim == 1:
        value += 0.5 * torch.rand(value.shape)
    x = images()
    expected = network.eval()(torch.from_numpy(np.array(x))).numpy()
  path = tmp_path / "weights.safetensors"
  tensors = {key: value.numpy() for key, value in network.state_dict().items()}
  safetensors.numpy.save_file(tensors, path)
  model = models.build(name.replace("_", ""), num_classes=7, rngs=nnx.Rngs(0))
  load_weights(model, path)
  np.testing.assert_allclose(
    logits(model, x), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
  )


@pytest.mark.slow
def test_other_floating_point_types_become_float32(narrow):
  tensors, write = narrow
  model = small()
  half = jnp.asarray(tensors["fc.weight"]).astype(jnp.bfloat16)
  load_weights(
    model,
    write(
      fc__weight=np.asarray(half), fc__bias=tensors["fc.bias"].astype("float64")
    ),
  )
  np.testing.assert_array_equal(
    model.head.kernel[...], np.asarray(half.astype(jnp.float32)).T
  )
  np.testing.assert_array_equal(model.head.bias[...], tensors["fc.bias"])
  assert {a.dtype for a in arrays(model)} == {np.dtype("float32")}


FLAWS = {
  "missing": (
    {"without": ("layer1.0.bn2.running_var",)},
    "missing: layer1.0.bn2.running_var$",
  ),
  "unknown": (
    {"layer9__weight": np.zeros(3, np.float32)},
    "unknown: layer9.weight$",
  ),
  "of another shape": (
    {"conv1__weight": np.zeros((4, 3, 3, 3), np.float32)},
    r"of another shape: conv1.weight \[4, 3, 3, 3\] instead of \[4, 3, 7, 7\]",
  ),
  "transposed": (
    {"fc__weight": np.zeros((32, 10), np.float32)},
    r"fc.weight \[32, 10\] instead of \[10, 32\]",
  ),
  "integers": (
    {"bn1__weight": np.zeros(4, np.int8)},
    "not finite floating-point numbers: bn1.weight$",
  ),
  "not a number": (
    {"bn1__bias": np.full(4, np.nan, np.float32)},
    "not finite floating-point numbers: bn1.bias$",
  ),
  "of another network": (
    {
      "without": [f"bn1.{s}" for s in ("weight", "bias", "running_mean")]
      + ["conv1.weight"]
    },
    "missing: conv1.weight, bn1.bias, bn1.running_mean and 1 more$",
  ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(narrow, flaw):
  changes, message = FLAWS[flaw]
  model = small()
  before = arrays(model)
  with pytest.raises(ValueError, match=message) as caught:
    load_weights(model, narrow[1]("flawed", **changes))
  assert str(caught.value).startswith("weights='") and "\n" not in str(
    caught.value
  )
  for old, new in zip(before, arrays(model), strict=True):
    np.testing.assert_array_equal(old, new)


def test_a_head_of_another_class_count_is_one_line(narrow):
  with pytest.raises(ValueError, match=r"fc.weight \[10, 32\] instead of \[4"):
    load_weights(small(num_classes=4), narrow[1]())
  with pytest.raises(
    ValueError, match="the tensors of torchvision's ResNet in"
  ):
    load_weights(small(num_classes=4), narrow[1]())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors" * 9])
def test_a_missing_or_damaged_file_is_one_line(tmp_path, content):
  path = tmp_path / "w.safetensors"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(
    ValueError, match="w.safetensors' must be a safetensors file"
  ):
    load_weights(small(), path)


def test_a_network_that_pytorch_does_not_have_is_an_error(narrow):
  for model in (
    small(preactivation=True),
    nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
  ):
    kind = type(model).__name__
    with pytest.raises(ValueError, match=f"has no network like this {kind};"):
      load_weights(model, narrow[1]())


def configuration(weights, **changes):
  """Digits has one channel, as has a file whose stem has one."""
  values = {
    "model": {"name": "resnet18", "options": {"width": 4}, "weights": weights},
    "stages": ("pretrain",),
    "pretrain": {"epochs": 0},
  }
  return from_dict(values | changes)


@pytest.fixture(scope="module")
def gray(narrow):
  return str(
    narrow[1]("gray", conv1__weight=narrow[0]["conv1.weight"].mean(1)[:, None])
  )


def test_a_run_starts_from_the_weights_that_it_is_given(gray, tmp_path):
  expected = small(channels=1)
  load_weights(expected, gray)
  run = RunContext(configuration(gray, stages=("multi_precision",)), tmp_path)
  for a, b in zip(arrays(float_network(run)), arrays(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def test_without_an_epoch_the_weights_are_scored_as_they_are(gray, tmp_path):
  summary = pipeline.run(configuration(gray), tmp_path / "run")
  model = small(channels=1)
  load_weights(model, gray)
  run = RunContext(configuration(gray), tmp_path)
  test = run.data.test.gather(np.arange(len(run.data.test)))
  model.eval()
  guesses = nnx.jit(lambda m, x: m(x))(
    model, jnp.asarray(test["image"])
  ).argmax(-1)
  score = summary["stages"]["pretrain"]["scores"]["float"]
  expected = 100 * np.mean(np.asarray(guesses) == test["label"])
  assert score["accuracy"] == pytest.approx(expected)
  assert not (tmp_path / "run" / "pretrain" / "checkpoints").exists()


def test_a_file_that_does_not_fit_stops_a_run_before_anything_is_written(
  narrow, tmp_path
):
  weights = str(narrow[1]())
  with pytest.raises(
    ConfigError, match=r"^model.weights=.*conv1.weight \[4, 3, 7, 7\] instead"
  ):
    pipeline.run(configuration(weights), tmp_path / "run")
  with pytest.raises(
    ConfigError, match=r"model\.weights='/none' must be a safetensors file,"
  ):
    pipeline.run(configuration("/none"), tmp_path / "run")
  assert not (tmp_path / "run").exists()
