"""ResNets for ImageNet: published sizes, and sums written out by hand.

The post-activation kind is compared with torchvision's definition in
torchvision_test.py.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from dr_jax import models, nn, quant
from dr_jax.models.imagenet_resnet import Block


def build(depth, **options):
  options = {"rngs": nnx.Rngs(0), **options}
  return models.ImageNetResNet(depth, **options)


def block(c_in, width, stride, **options):
  options = {"bottleneck": False, "preactivation": False, **options}
  made = Block(
    c_in, width, stride, dtype=jnp.float32, rngs=nnx.Rngs(0), **options
  )
  made.eval()
  return made


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
  ("depth", "parameters", "macs", "published"),
  [
    # Parameters and GMACs of torchvision's documentation.
    (18, 11_689_512, 1_814_073_344, 1.81),
    (34, 21_797_672, 3_663_761_408, 3.66),
    (50, 25_557_032, 4_089_184_256, 4.09),
  ],
)
def test_costs_at_224_pixels_are_those_published(
  cost, depth, parameters, macs, published
):
  assert cost(lambda: build(depth), 224) == (parameters, macs)
  assert round(macs / 1e9, 2) == published


def test_preactivation_moves_norms_and_nothing_else(cost):
  parameters, macs = cost(lambda: build(18), 224)
  # No norm behind the stem and the three shortcuts, one before the head, and
  # at each change of width a norm of the narrower side.
  norms = 64 + (128 + 256 + 512) - 512 + (64 + 128 + 256)
  assert cost(lambda: build(18, preactivation=True), 224) == (
    parameters - 2 * norms,
    macs,
  )


@pytest.mark.parametrize("width", [0, -1, 64.0, True, 10**21])
def test_a_width_that_is_no_number_of_channels_is_an_error(width):
  with pytest.raises(ValueError, match=rf"width must be .*, got {width!r}"):
    build(18, width=width)


def test_preactivation_must_be_true_or_false():
  with pytest.raises(ValueError, match="preactivation must be .* got 'no'"):
    build(18, preactivation="no")


@pytest.mark.parametrize("depth", [-1, 0, 17, 20, 56, (18,), [18], 18.0])
def test_a_depth_that_is_not_in_the_table_is_an_error(depth):
  with pytest.raises(
    ValueError, match=f"depth must be one of 18, 34.* {re.escape(repr(depth))}"
  ):
    build(depth)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_block_of_the_same_shape_adds_its_input(bottleneck):
  x = jnp.asarray(draw(2, 5, 5, 16))
  width = 4 if bottleneck else 16
  post = block(16, width, 1, bottleneck=bottleneck)
  last = getattr(post, f"norm{post.depth}")
  last.scale[...] = jnp.zeros_like(last.scale[...])
  np.testing.assert_array_equal(post(x), np.maximum(np.asarray(x), 0))
  pre = block(16, width, 1, bottleneck=bottleneck, preactivation=True)
  last = getattr(pre, f"conv{pre.depth}")
  last.kernel[...] = jnp.zeros_like(last.kernel[...])
  np.testing.assert_array_equal(pre(x), x)


def test_the_stride_of_a_bottleneck_is_on_its_3x3_convolution():
  made = block(8, 4, 2, bottleneck=True)
  strides = [getattr(made, f"conv{n}").strides for n in (1, 2, 3)]
  assert strides == [1, 2, 1]
  assert made.shortcut.strides == 2 and made.c_out == 16


def conv(layer, x, stride, padding):
  return lax.conv_general_dilated(
    x,
    layer.kernel[...],
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def active(norm, x):
  """ReLU of inference-mode norm."""
  parts = (norm.mean, norm.var, norm.scale, norm.bias)
  mean, var, scale, bias = (np.asarray(part[...]) for part in parts)
  x = np.asarray(x)
  y = (x - mean[None, None, None]) / np.sqrt(var + 1e-5)[None, None, None]
  y = y * scale[None, None, None] + bias[None, None, None]
  return jnp.asarray(np.maximum(y, 0))


def preactivated(model, x, sizes):
  """The definition of arXiv 1603.05027, layer by layer."""
  x = lax.reduce_window(
    conv(model.stem, x, 2, 3),
    -jnp.inf,
    lax.max,
    (1, 3, 3, 1),
    (1, 2, 2, 1),
    ((0, 0), (1, 1), (1, 1), (0, 0)),
  )
  for number in range(1, 5):
    stage = getattr(model, f"stage{number}")
    for place in range(stage.depth):
      part = getattr(stage, f"block{place}")
      first = 2 if number > 1 and place == 0 else 1
      y = active(part.norm1, x)
      if part.shortcut is not None:
        x = conv(part.shortcut, y, first, 0)
      y = conv(part.conv1, y, first if sizes[0] == 3 else 1, sizes[0] // 2)
      for n, size in enumerate(sizes[1:], start=2):
        y = active(getattr(part, f"norm{n}"), y)
        stride = first if sizes[0] == 1 and size == 3 else 1
        y = conv(getattr(part, f"conv{n}"), y, stride, size // 2)
      x = x + y
  x = np.asarray(active(model.norm, x)).mean((1, 2))
  return x @ np.asarray(model.head.kernel[...]) + np.asarray(
    model.head.bias[...]
  )


@pytest.mark.parametrize(
  ("depth", "sizes"),
  [(18, (3, 3)), pytest.param(50, (1, 3, 1), marks=pytest.mark.slow)],
)
def test_the_preactivation_network_is_that_of_its_paper(depth, sizes):
  model = build(depth, preactivation=True, width=4, num_classes=5)
  model.eval()
  for number, (_, norm) in enumerate(nnx.iter_modules(model)):
    if type(norm) is nnx.BatchNorm:
      c = norm.mean.shape
      norm.mean[...] = jnp.asarray(0.1 * draw(*c, seed=number))
      norm.var[...] = jnp.asarray(np.exp(draw(*c, seed=number + 1) / 4))
      norm.bias[...] = jnp.asarray(0.1 * draw(*c, seed=number + 2))
  x = jnp.asarray(draw(2, 33, 33, 3))
  logits = np.asarray(nnx.jit(lambda m, x: m(x))(model, x))
  expected = preactivated(model, x, sizes)
  # float32 sums in another order, through up to 53 layers.
  np.testing.assert_allclose(
    logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max()
  )


def test_weights_start_as_torchvisions():
  made = block(64, 128, 2)
  kernel = np.asarray(made.conv1.kernel[...])
  # kaiming_normal_ with fan_out; 73,728 draws, so a standard error of 0.5 %.
  np.testing.assert_allclose(kernel.var(), 2 / (9 * 128), rtol=0.03)
  # Not truncated: some draws are beyond the 2.3 deviations that jax cuts at.
  assert np.abs(kernel).max() > 3.5 * kernel.std()
  head = build(18, width=8, num_classes=1000).head
  bound = 64**-0.5
  for array in (head.kernel[...], head.bias[...]):
    values = np.asarray(array)
    assert 0.98 * bound < values.max() <= bound
    assert -bound <= values.min() < -0.98 * bound


@pytest.mark.parametrize("preactivation", [False, True])
def test_all_inner_layers_are_quantized_and_see_no_negative_input(
  preactivation,
):
  model = nn.quantize(
    build(18, preactivation=preactivation, width=4, num_classes=5),
    weight=quant.double_rounding((8, 2)),
    activation=quant.lsq_activation((8, 2)),
    sample=jnp.asarray(draw(2, 32, 32, 3)),
  )
  table = nn.layer_table(model)
  assert len(table) == 16 + 3
  assert not any(row.signed for row in table)
  shortcuts = [r.name for r in table if r.name.endswith("shortcut")]
  assert shortcuts == [f"stage{n}/block0/shortcut" for n in (2, 3, 4)]


@pytest.mark.parametrize(
  "name",
  ["resnet", "resnet18", pytest.param("mobilenetv2", marks=pytest.mark.slow)],
)
def test_networks_compute_in_their_dtype(name):
  options = {
    "resnet": {"depth": 8, "widths": (4, 4, 8)},
    "resnet18": {"width": 4},
    "mobilenetv2": {"width": 0.1},
  }[name]
  x = jnp.asarray(draw(2, 32, 32, 3))
  logits = {}
  for dtype in ("float32", "bfloat16"):
    model = models.build(
      name, num_classes=5, dtype=dtype, rngs=nnx.Rngs(0), **options
    )
    model.eval()
    graph, state = nnx.split(model)
    apply = lambda s, x, graph=graph: nnx.merge(graph, s)(x)  # noqa: E731
    # nnx.BatchNorm itself relies on promotion to float32.
    with jax.numpy_dtype_promotion("standard"):
      equations = jax.make_jaxpr(apply)(state, x).eqns
      logits[dtype] = np.asarray(jax.jit(apply)(state, x))
    products = ("conv_general_dilated", "dot_general")
    types = {
      str(e.outvars[0].aval.dtype)
      for e in equations
      if e.primitive.name in products
    }
    assert types == {dtype}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32"}
    assert logits[dtype].dtype == np.float32
  # Eight bits of mantissa, through up to 53 layers.
  difference = np.abs(logits["float32"] - logits["bfloat16"]).max()
  assert 0 < difference < 0.1 * np.abs(logits["float32"]).max()
