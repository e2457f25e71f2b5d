"""MobileNetV2: published sizes, widths, and what a block adds.

Its layers are compared with torchvision's definition in torchvision_test.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import models, nn, quant
from dr_jax.models.mobilenet import InvertedResidual


def build(**options):
  return models.MobileNetV2(**{"rngs": nnx.Rngs(0), **options})


def draw(*shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  return jnp.asarray(x)


def test_costs_at_224_pixels_are_those_published(cost):
  # Parameters and GMACs of torchvision's documentation.
  parameters, macs = cost(build, 224)
  assert parameters == 3_504_872
  assert macs == 300_774_272 and round(macs / 1e9, 2) == 0.30


@pytest.mark.parametrize(
  ("width", "stem", "last"),
  # 11.2 and 3.2 are more than a tenth above 8 and 0; 44.8 is nearest to 48.
  [(1.0, 32, 1280), (0.35, 16, 1280), (0.1, 8, 1280), (1.4, 48, 1792)],
)
def test_widths_are_rounded_to_multiples_of_8(width, stem, last):
  model = nnx.eval_shape(lambda: build(width=width))
  assert model.stem.out_features == stem
  assert model.last.out_features == model.head.in_features == last


@pytest.mark.parametrize(
  "width", [0, -1.0, float("nan"), float("inf"), 1e-3, 101, True, "1"]
)
def test_a_width_out_of_range_is_an_error(width):
  message = rf"width must be in 0\.01\.\.100, got {width!r}"
  with pytest.raises(ValueError, match=message):
    build(width=width)


def residual(c_in, c_out, stride):
  block = InvertedResidual(
    c_in, c_out, stride, expansion=6, dtype=jnp.float32, rngs=nnx.Rngs(0)
  )
  block.eval()
  norm = block.project_norm
  norm.scale[...] = jnp.zeros_like(norm.scale[...])
  return block


def test_only_a_block_of_the_same_shape_adds_its_input():
  x = draw(2, 6, 6, 8)
  np.testing.assert_array_equal(residual(8, 8, 1)(x), x)
  np.testing.assert_array_equal(residual(8, 8, 2)(x), np.zeros((2, 3, 3, 8)))
  np.testing.assert_array_equal(residual(8, 16, 1)(x), np.zeros((2, 6, 6, 16)))


def test_weights_start_as_torchvisions():
  block = residual(16, 16, 1)
  # kaiming_normal_ with fan_out, which for depthwise ones counts all channels.
  for conv, fan_out in ((block.expand, 96), (block.depthwise, 9 * 96)):
    kernel = np.asarray(conv.kernel[...])
    # 1,536 and 864 draws: a standard error of 5 % at most.
    np.testing.assert_allclose(kernel.var(), 2 / fan_out, rtol=0.2)
  head = build(width=0.1, num_classes=100).head
  np.testing.assert_allclose(head.kernel[...].std(), 0.01, rtol=0.02)
  np.testing.assert_array_equal(head.bias[...], 0)


@pytest.mark.slow
def test_inputs_of_expansions_are_signed_and_others_are_not():
  model = nn.quantize(
    build(width=0.1, num_classes=5),
    weight=quant.double_rounding((8, 2)),
    activation=quant.lsq_activation((8, 2)),
    sample=draw(2, 32, 32, 3),
  )
  table = nn.layer_table(model)
  # Two layers in the first block, three in 16, and the last convolution, whose
  # input comes from a linear bottleneck too.
  assert len(table) == 2 + 3 * 16 + 1
  for row in table:
    assert row.signed == (row.name.endswith("/expand") or row.name == "last")
