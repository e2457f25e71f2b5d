"""Vision transformers: published sizes, and a block against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import models, nn, quant

SMALL = {"num_classes": 4, "image_size": 8, "patch_size": 4, "width": 12}


def small(**options):
  return models.build(
    "vit", rngs=nnx.Rngs(0), **{"depth": 2, **SMALL} | options
  )


@pytest.mark.parametrize(
  ("name", "parameters", "gmacs"),
  # arXiv 2012.12877, table 1 (5 M, 22 M), and timm's to the last one.
  [("vit_tiny", 5_717_416, 1.3), ("vit_small", 22_050_664, 4.6)],
)
def test_parameters_and_costs_are_those_published(
  cost, name, parameters, gmacs
):
  counted, macs = cost(
    lambda: models.build(name, num_classes=1000, rngs=nnx.Rngs(0)), 224
  )
  assert counted == parameters
  assert round(macs / 1e9, 1) == gmacs


@pytest.mark.parametrize("channels", [1, 3])
def test_logits_are_float32_and_one_row_per_image(channels):
  images = jnp.ones((2, 8, 8, channels))
  model = nnx.eval_shape(lambda: small(channels=channels, dtype="bfloat16"))
  # Flax's norms take mean and variance in float32.
  with jax.numpy_dtype_promotion("standard"):
    logits = nnx.eval_shape(lambda m, x: m(x), model, images)
  assert logits.shape == (2, 4) and logits.dtype == jnp.float32


def test_the_network_is_the_published_formula():
  model = small()
  x = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
  get = lambda variable: np.asarray(variable[...], np.float64)  # noqa: E731

  def norm(layer, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * get(layer.scale) + get(layer.bias)

  def linear(layer, x):
    return np.tensordot(x, get(layer.kernel), 1) + get(layer.bias)

  def gelu(x):
    erf = jax.scipy.special.erf(np.float32(x / np.sqrt(2)))
    return x * (1 + np.asarray(erf)) / 2

  def attention(layer, x):
    query, key, value = (
      linear(part, x) for part in (layer.query, layer.key, layer.value)
    )
    scores = np.einsum("thd,shd->hts", query, key) / np.sqrt(4)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    y = np.einsum("hts,shd->thd", weights, value)
    return np.einsum("thd,hdc->tc", y, get(layer.out.kernel)) + get(
      layer.out.bias
    )

  patches = x.reshape(2, 4, 2, 4, 3).transpose(0, 2, 1, 3, 4).reshape(4, 48)
  tokens = patches @ get(model.patches.kernel).reshape(48, 12)
  tokens = tokens + get(model.patches.bias)
  tokens = np.concatenate([get(model.class_token)[0], tokens])
  tokens = tokens + get(model.positions)[0]
  for block in model.blocks:
    tokens = tokens + attention(
      block.attention, norm(block.attention_norm, tokens)
    )
    hidden = gelu(linear(block.up, norm(block.up_norm, tokens)))
    tokens = tokens + linear(block.down, hidden)
  expected = linear(model.head, norm(model.norm, tokens)[0])
  np.testing.assert_allclose(model(jnp.asarray(x))[0], expected, atol=1e-5)


def test_images_of_another_size_are_an_error():
  with pytest.raises(ValueError, match="must be 8 x 8 pixels.* got 8 x 12"):
    small()(jnp.ones((1, 8, 12, 3)))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"patch_size": 3}, "patch_size must divide image_size=8, got 3"),
    ({"heads": 5}, "heads must divide width=12, got 5"),
    ({"depth": 0}, r"depth must be an integer in 1\.\..*, got 0"),
    ({"image_size": 8.0}, r"image_size must be an integer in .*, got 8\.0"),
  ],
)
def test_a_size_that_is_not_allowed_is_an_error_that_names_it(options, message):
  with pytest.raises(ValueError, match=message):
    small(**options)


def test_a_tiny_network_has_no_option_for_its_depth():
  with pytest.raises(ValueError, match="options of model 'vit_tiny'.* 'depth'"):
    models.build("vit_tiny", depth=3, rngs=nnx.Rngs(0))


def test_every_product_with_a_kernel_is_quantized():
  model = small(depth=1)
  quantized = nn.quantize(
    model,
    weight=quant.double_rounding((8, 2)),
    sample=jnp.ones((1, 8, 8, 3)),
    skip=(),
  )
  names = {row.name for row in nn.layer_table(quantized)}
  attention = {
    f"blocks/0/attention/{name}" for name in ("query", "key", "value", "out")
  }
  layers = {"patches", "blocks/0/up", "blocks/0/down", "head"}
  assert names == attention | layers
