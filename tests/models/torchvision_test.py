"""Weights with torchvision's names, in networks written out in torch's layout.

The reference knows nothing of Flax: it draws the tensors that torchvision's
definitions ask for, by their names, and computes with them in NCHW.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax import lax

from dr_jax import models, pipeline
from dr_jax.config import ConfigError, from_dict
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.pretrain import float_network


class Torch:
  """torchvision's networks in inference mode; tensors are drawn when used."""

  def __init__(self, seed=0):
    self.rng = np.random.default_rng(seed)
    self.tensors = {}
    self.highest = 0.0

  def tensor(self, name, shape, low=None, high=None):
    if low is None:
      drawn = self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
    else:
      drawn = self.rng.uniform(low, high, shape)
    return self.tensors.setdefault(name, drawn.astype(np.float32))

  def conv(self, x, name, c_out, size, stride=1, groups=1):
    shape = (c_out, x.shape[1] // groups, size, size)
    return lax.conv_general_dilated(
      x,
      jnp.asarray(self.tensor(f"{name}.weight", shape)),
      (stride, stride),
      [(size // 2, size // 2)] * 2,
      dimension_numbers=("NCHW", "OIHW", "NCHW"),
      feature_group_count=groups,
    )

  def norm(self, x, name):
    weight, bias, mean, var = (
      self.tensor(f"{name}.{suffix}", (x.shape[1],), *bounds).reshape(
        1, -1, 1, 1
      )
      for suffix, bounds in (
        ("weight", (0.5, 2.0)),
        ("bias", (-0.5, 0.5)),
        ("running_mean", (-0.5, 0.5)),
        ("running_var", (0.5, 2.0)),
      )
    )
    self.tensors[f"{name}.num_batches_tracked"] = np.asarray(7)
    x = np.asarray(x)
    return jnp.asarray((x - mean) / np.sqrt(var + 1e-5) * weight + bias)

  def linear(self, x, name, c_out):
    weight = self.tensor(f"{name}.weight", (c_out, x.shape[1]))
    return x @ weight.T + self.tensor(f"{name}.bias", (c_out,), -1, 1)

  def relu6(self, x):
    self.highest = max(self.highest, float(x.max()))
    return jnp.clip(x, 0.0, 6.0)

  def resnet(self, x, blocks, bottleneck, width, classes):
    x = jax.nn.relu(self.norm(self.conv(x, "conv1", width, 7, 2), "bn1"))
    pads = ((0, 0), (0, 0), (1, 1), (1, 1))
    x = lax.reduce_window(
      x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), pads
    )
    for stage, count in enumerate(blocks):
      planes = width * 2**stage
      for number in range(count):
        stride = 2 if stage and not number else 1
        x = self.block(
          x, f"layer{stage + 1}.{number}", planes, stride, bottleneck
        )
    return self.linear(np.asarray(x).mean((2, 3)), "fc", classes)

  def block(self, x, name, planes, stride, bottleneck):
    if bottleneck:
      c_out = 4 * planes
      y = self.norm(self.conv(x, f"{name}.conv1", planes, 1), f"{name}.bn1")
      y = self.conv(jax.nn.relu(y), f"{name}.conv2", planes, 3, stride)
      y = jax.nn.relu(self.norm(y, f"{name}.bn2"))
      y = self.norm(self.conv(y, f"{name}.conv3", c_out, 1), f"{name}.bn3")
    else:
      c_out = planes
      y = self.conv(x, f"{name}.conv1", planes, 3, stride)
      y = jax.nn.relu(self.norm(y, f"{name}.bn1"))
      y = self.norm(self.conv(y, f"{name}.conv2", planes, 3), f"{name}.bn2")
    if stride != 1 or x.shape[1] != c_out:
      x = self.conv(x, f"{name}.downsample.0", c_out, 1, stride)
      x = self.norm(x, f"{name}.downsample.1")
    return jax.nn.relu(x + y)

  def mobilenet(self, x, classes):
    """At width_mult=0.25: channels are multiples of 8, the last are 1280."""
    settings = [
      *((1, 8, 1, 1), (6, 8, 2, 2), (6, 8, 3, 2), (6, 16, 4, 2)),
      *((6, 24, 3, 1), (6, 40, 3, 2), (6, 80, 1, 1)),
    ]
    x = self.unit(x, "features.0", 8, 3, 2)
    place = 1
    for t, c, n, s in settings:
      for number in range(n):
        x = self.inverted(x, f"features.{place}.conv", t, c, 1 if number else s)
        place += 1
    x = self.unit(x, f"features.{place}", 1280, 1)
    return self.linear(np.asarray(x).mean((2, 3)), "classifier.1", classes)

  def unit(self, x, name, c_out, size, stride=1, groups=1):
    x = self.conv(x, f"{name}.0", c_out, size, stride, groups)
    return self.relu6(self.norm(x, f"{name}.1"))

  def inverted(self, x, name, t, c_out, stride):
    y, hidden = x, t * x.shape[1]
    if t != 1:
      y = self.unit(y, f"{name}.0", hidden, 1)
    at = int(t != 1)
    y = self.unit(y, f"{name}.{at}", hidden, 3, stride, hidden)
    y = self.norm(
      self.conv(y, f"{name}.{at + 1}", c_out, 1), f"{name}.{at + 2}"
    )
    return x + y if stride == 1 and x.shape[1] == c_out else y


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
  models.load_torchvision(model, path)
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
  models.load_torchvision(model, path)
  np.testing.assert_allclose(
    logits(model, x), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
  )


@pytest.mark.slow
def test_other_floating_point_types_become_float32(narrow):
  tensors, write = narrow
  model = small()
  half = jnp.asarray(tensors["fc.weight"]).astype(jnp.bfloat16)
  models.load_torchvision(
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
    "missing: conv1.weight, bn1.weight, bn1.bias and 1 more$",
  ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(narrow, flaw):
  changes, message = FLAWS[flaw]
  model = small()
  before = arrays(model)
  with pytest.raises(ValueError, match=message) as caught:
    models.load_torchvision(model, narrow[1]("flawed", **changes))
  assert str(caught.value).startswith("weights='") and "\n" not in str(
    caught.value
  )
  for old, new in zip(before, arrays(model), strict=True):
    np.testing.assert_array_equal(old, new)


def test_a_head_of_another_class_count_is_one_line(narrow):
  with pytest.raises(ValueError, match=r"fc.weight \[10, 32\] instead of \[4"):
    models.load_torchvision(small(num_classes=4), narrow[1]())
  with pytest.raises(ValueError, match="torchvision's network with 4 classes"):
    models.load_torchvision(small(num_classes=4), narrow[1]())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors" * 9])
def test_a_missing_or_damaged_file_is_one_line(tmp_path, content):
  path = tmp_path / "w.safetensors"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(
    ValueError, match="w.safetensors' must be a safetensors file"
  ):
    models.load_torchvision(small(), path)


def test_a_network_that_torchvision_does_not_have_is_an_error(narrow):
  for model in (
    small(preactivation=True),
    models.ResNet(8, num_classes=10, rngs=nnx.Rngs(0)),
  ):
    with pytest.raises(ValueError, match="has no network like this .*ResNet"):
      models.load_torchvision(model, narrow[1]())


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
  models.load_torchvision(expected, gray)
  run = RunContext(configuration(gray, stages=("multi_precision",)), tmp_path)
  for a, b in zip(arrays(float_network(run)), arrays(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def test_without_an_epoch_the_weights_are_scored_as_they_are(gray, tmp_path):
  summary = pipeline.run(configuration(gray), tmp_path / "run")
  model = small(channels=1)
  models.load_torchvision(model, gray)
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
