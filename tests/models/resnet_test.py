"""Residual networks: sizes, costs and shapes counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import models, nn, quant

DEPTHS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85}


def make(depth, **options):
  options = {"num_classes": 10, "rngs": nnx.Rngs(0), **options}
  return getattr(models, f"resnet{depth}")(**options)


def small(depth=8, **options):
  options = {
    "num_classes": 4,
    "widths": (4, 6, 8),
    "rngs": nnx.Rngs(0),
    **options,
  }
  return models.ResNet(depth, **options)


def count(model):
  return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("depth", DEPTHS)
def test_parameters_are_those_published_and_those_counted(depth):
  parameters = count(nnx.eval_shape(lambda: make(depth)))
  # What is published has no weights in the two shortcuts.
  published = parameters - 16 * 32 - 32 * 64
  assert round(published / 1e6, 2) == DEPTHS[depth]
  n = (depth - 2) // 6
  stem, head = 9 * 3 * 16, 64 * 10 + 10
  stage1 = n * (2 * 9 * 16 * 16 + 2 * 32)
  # First block: two convolutions, a 1x1 shortcut, norms of 16 and 32.
  stage2 = (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32 + 32 + 64) + (n - 1) * (
    2 * 9 * 32 * 32 + 2 * 64
  )
  stage3 = (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64 + 64 + 128) + (n - 1) * (
    2 * 9 * 64 * 64 + 2 * 128
  )
  assert parameters == stem + stage1 + stage2 + stage3 + 2 * 64 + head


def test_resnet20_has_exactly_272282_parameters():
  assert count(nnx.eval_shape(lambda: make(20))) == 272_282


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 9])
def test_logits_have_one_row_per_image_at_any_size(channels, size):
  images = jnp.ones((2, size, size, channels))
  logits = nnx.eval_shape(lambda x: small(channels=channels)(x), images)
  assert logits.shape == (2, 4) and logits.dtype == jnp.float32


@pytest.mark.parametrize("depth", [-4, 2, 7, 10, 18, 19, 51, 8.0, 10**21])
def test_a_depth_that_is_not_6n_plus_2_raises_an_error(depth):
  with pytest.raises(
    ValueError, match=f"depth must be 6 n \\+ 2.* got {depth}"
  ):
    models.ResNet(depth, num_classes=10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  "widths", [(0, 4, 8), (4, 8, 2**15), (4.0, 8, 16), (True, 4, 8), (4, 8, "8")]
)
def test_a_width_that_is_no_number_of_channels_raises_an_error(widths):
  with pytest.raises(ValueError, match=r"widths must be an integer in 1\.\.16"):
    models.build("resnet20", widths=widths, num_classes=2, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="widths must be three, as .* got 3"):
    models.build("resnet20", widths=3, num_classes=2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ("stride", "sizes"), [(1, (9, 9, 5, 3)), (2, (5, 5, 3, 2))]
)
def test_the_stride_of_the_stem_decides_the_size_of_every_map(stride, sizes):

  def maps(x):
    model = small(stem_stride=stride)
    stages = (model.stem, model.stage1, model.stage2, model.stage3)
    return [x := stage(x) for stage in stages]

  found = nnx.eval_shape(maps, jnp.ones((2, 9, 9, 3)))
  assert [x.shape[1:3] for x in found] == [(size, size) for size in sizes]


@pytest.mark.parametrize("stride", [0, 3, 2.0, True])
def test_a_stride_of_the_stem_that_is_not_1_or_2_raises_an_error(stride):
  with pytest.raises(ValueError, match=r"stem_stride must be an integer in 1"):
    small(stem_stride=stride)


def test_costs_of_resnet20_are_those_counted_by_hand():
  graph, state = nnx.split(nnx.eval_shape(lambda: make(20)))
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
  model = nn.quantize(
    nnx.merge(graph, state),
    weight=quant.double_rounding((8, 2)),
    sample=jnp.ones((1, 32, 32, 3)),
    skip=(),
  )
  table = nn.layer_table(model)
  macs = {row.name: row.macs for row in table}
  assert macs["stem"] == 1024 * 432
  assert macs["stage1/block0/conv1"] == 1024 * 2304
  assert macs["stage2/block0/conv1"] == 256 * 4608
  assert macs["stage2/block0/shortcut"] == 256 * 512
  assert macs["stage3/block2/conv2"] == 64 * 36864
  assert macs["head"] == 640
  # 13,824, 51,200 and 204,800 kernel entries in the stages.
  assert sum(macs.values()) == (
    1024 * (432 + 13_824) + 256 * 51_200 + 64 * 204_800 + 640
  )
  assert sum(row.parameters for row in table) == 270_896
  # 1 + 18 + 2 shortcuts + 1, in the order of the calls.
  names = [row.name for row in table]
  assert len(names) == 22
  assert names[0] == "stem" and names[-1] == "head"
  block = [name for name in names if name.startswith("stage2/block0/")]
  assert block == [
    f"stage2/block0/{layer}" for layer in ("shortcut", "conv1", "conv2")
  ]
  for number in (1, 2):
    assert f"stage2/block{number}/shortcut" not in names


def test_a_block_is_the_sum_of_its_input_and_its_branch():
  rngs = nnx.Rngs(0)
  block = models.resnet.Block(4, 4, 1, rngs=rngs)
  changing = models.resnet.Block(4, 6, 2, rngs=rngs)
  block.eval()
  changing.eval()
  block.conv2.kernel[...] = jnp.zeros_like(block.conv2.kernel[...])
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 4)))
  x = x.astype(jnp.float32)
  np.testing.assert_array_equal(block(x), x)
  changing.conv2.kernel[...] = jnp.zeros_like(changing.conv2.kernel[...])
  # Strided 1x1 of the activated input: running statistics are 0 and 1.
  active = np.maximum(np.asarray(x), 0) / np.sqrt(1 + 1e-5)
  kernel = np.asarray(changing.shortcut.kernel[...])[0, 0]
  np.testing.assert_allclose(
    changing(x), active[:, ::2, ::2] @ kernel, rtol=1e-5, atol=1e-5
  )


def test_convolutions_start_with_the_variance_of_he():
  block = models.resnet.Block(64, 64, 1, rngs=nnx.Rngs(0))
  kernel = np.asarray(block.conv1.kernel[...])
  # Of 36,864 draws the variance has a standard error below one percent.
  np.testing.assert_allclose(kernel.var(), 2 / (9 * 64), rtol=0.05)


def test_different_seeds_give_different_weights_and_equal_ones_equal():
  make_block = models.resnet.Block
  kernels = [
    np.asarray(make_block(2, 3, 1, rngs=nnx.Rngs(seed)).conv1.kernel[...])
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert not np.array_equal(kernels[0], kernels[2])


def test_running_statistics_move_by_a_tenth():
  block = models.resnet.Block(3, 4, 1, rngs=nnx.Rngs(0))
  block.train()
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)))
  x = x.astype(jnp.float32)
  seen = np.asarray(x).reshape(-1, 3)
  nnx.jit(lambda m, x: m(x))(block, x)
  norm = block.norm1
  np.testing.assert_allclose(norm.mean[...], 0.1 * seen.mean(0), atol=1e-5)
  np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * seen.var(0), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "complex64", "float8_e4m3fn", "x"])
def test_a_dtype_that_networks_do_not_compute_in_raises_an_error(dtype):
  with pytest.raises(ValueError, match="dtype must be one of bfloat16"):
    models.build("resnet20", num_classes=2, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  "options",
  [
    *({"num_classes": value} for value in (0, -1, 2**33, 2.0, "2", True)),
    *({"channels": value} for value in (0, -1, 2**33, 3.0, (3,), None)),
    *({"dtype": value} for value in ("int8", "x", ("a",), 3, object())),
    {"depth": 8},
    {"x": 1},
  ],
)
@pytest.mark.parametrize(
  "name", ["resnet20", "resnet18", "mobilenetv2", "vit_tiny"]
)
def test_an_option_of_a_network_is_an_error_with_what_is_allowed(name, options):
  (option,) = options
  with pytest.raises(
    ValueError, match=rf"{option}.* must be|must be.*{option}"
  ):
    models.build(name, rngs=nnx.Rngs(0), **options)
