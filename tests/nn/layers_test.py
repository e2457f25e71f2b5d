"""Quantized layers against the float layer on quant-dequantized operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, quant
from dr_jax.nn import layers
from dr_jax.nn.bits import arrays_of
from dr_jax.nn.quantized import LayerInfo

BITS = (8, 4, 2)


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv(c_in, c_out, size, **options):
  layer = nnx.Conv(c_in, c_out, size, rngs=nnx.Rngs(3), **options)
  if layer.bias is not None:
    layer.bias[...] = jnp.asarray(random(c_out, seed=4), layer.bias.dtype)
  return layer


def linear(c_in, c_out, **options):
  layer = nnx.Linear(c_in, c_out, rngs=nnx.Rngs(3), **options)
  if layer.bias is not None:
    layer.bias[...] = jnp.asarray(random(c_out, seed=4), layer.bias.dtype)
  return layer


def quantize(layer, x, **options):
  options = {
    "weight": quant.double_rounding(BITS),
    "activation": quant.lsq_activation(BITS),
    **options,
  }
  return nn.quantize(layer, sample=jnp.asarray(x), skip=(), **options)


def quantized_weight(w, scale, bits):
  """Double Rounding in numpy: np.round is half-to-even."""
  codes = np.clip(np.round(w / scale), -128, 127)
  codes = np.round(codes / 2 ** (8 - bits))
  codes = np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
  return (codes * scale * 2 ** (8 - bits)).astype(np.float32)


def quantized_input(x, scale, bits, signed):
  low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
  if not signed:
    low, high = 0, 2**bits - 1
  return (np.clip(np.round(x / scale), low, high) * scale).astype(np.float32)


def expected_output(layer, quantized, x, bits):
  """The float layer, fed with operands quantized in numpy."""
  i = BITS.index(bits)
  w_scale = np.asarray(quantized.weight_params["scale"][...])
  x_scale = np.asarray(quantized.input_params["scale"][...])[i]
  layer = nnx.clone(layer)
  kernel = np.asarray(layer.kernel[...])
  layer.kernel[...] = jnp.asarray(quantized_weight(kernel, w_scale, bits))
  signed = bool((x < 0).any())
  return layer(jnp.asarray(quantized_input(x, x_scale, bits, signed)))


CONVOLUTIONS = {
  "same": ((2, 6, 6, 3), dict(size=(3, 3))),
  "valid": ((2, 6, 6, 3), dict(size=(3, 3), padding="VALID")),
  "circular": ((2, 6, 6, 3), dict(size=(3, 3), padding="CIRCULAR")),
  "reflect": ((2, 6, 6, 3), dict(size=(3, 3), padding="REFLECT")),
  "one_integer_padding": ((2, 6, 6, 3), dict(size=(3, 3), padding=2)),
  "explicit_padding": (
    (2, 6, 6, 3),
    dict(size=(3, 3), padding=((0, 2), (1, 0))),
  ),
  "causal": ((2, 7, 3), dict(size=(3,), padding="CAUSAL")),
  "strided": ((2, 7, 7, 3), dict(size=(3, 3), strides=(2, 3))),
  "dilated": ((2, 8, 8, 3), dict(size=(3, 3), kernel_dilation=2)),
  "input_dilated": (
    (2, 5, 5, 3),
    dict(size=(3, 3), input_dilation=2, padding=1),
  ),
  "circular_dilated": (
    (2, 8, 8, 3),
    dict(size=(3, 3), kernel_dilation=2, padding="CIRCULAR"),
  ),
  "grouped": ((2, 6, 6, 4), dict(size=(3, 3), feature_group_count=2)),
  "depthwise": ((2, 6, 6, 4), dict(size=(3, 3), feature_group_count=4)),
  "without_bias": ((2, 6, 6, 3), dict(size=(3, 3), use_bias=False)),
  "one_dimensional": ((2, 9, 3), dict(size=5)),
  "three_dimensional": ((1, 4, 4, 4, 2), dict(size=(2, 3, 2))),
  "two_batch_dimensions": ((2, 3, 6, 6, 3), dict(size=(3, 3))),
  "masked": (
    (2, 6, 6, 3),
    dict(size=(1, 1), mask=jnp.asarray(np.eye(3, 4)[None, None], jnp.float32)),
  ),
}


# How inputs are rounded does not depend on the shape of the convolution.
@pytest.mark.parametrize(
  ("case", "negative"),
  [
    *((case, True) for case in CONVOLUTIONS),
    ("same", False),
    ("grouped", False),
  ],
)
def test_conv_is_the_float_conv_on_quantized_input_and_kernel(case, negative):
  shape, options = CONVOLUTIONS[case]
  x = random(*shape) if negative else np.abs(random(*shape))
  layer = conv(shape[-1], 4, **options)
  quantized = quantize(layer, x)
  for bits in BITS:
    nn.set_bits(quantized, bits)
    expected = expected_output(layer, quantized, x, bits)
    # The same convolution on the same numbers, up to the order of its sums.
    np.testing.assert_allclose(
      quantized(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_is_the_float_linear_for_any_batch_dimensions(lead, use_bias):
  x = random(*lead, 6)
  layer = linear(6, 4, use_bias=use_bias)
  quantized = quantize(layer, x)
  for bits in BITS:
    nn.set_bits(quantized, bits)
    expected = expected_output(layer, quantized, x, bits)
    assert expected.shape == (*lead, 4)
    np.testing.assert_allclose(
      quantized(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6
    )


def test_bits_change_the_output_of_a_layer():
  x = random(5, 6)
  quantized = quantize(linear(6, 4), x)
  outputs = []
  for bits in BITS:
    nn.set_bits(quantized, bits)
    outputs.append(np.asarray(quantized(jnp.asarray(x))))
  error = [np.abs(y - linear(6, 4)(jnp.asarray(x))).mean() for y in outputs]
  assert 0 < error[0] < error[1] < error[2]


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_bfloat16_layers_quantize_in_float32_and_compute_in_bfloat16(kind):
  x = random(3, 5, 5, 4)
  options = dict(dtype=jnp.bfloat16)
  layer = (
    conv(4, 6, size=(3, 3), **options)
    if kind == "conv"
    else linear(4, 6, **options)
  )
  quantized = quantize(layer, x)
  nn.set_bits(quantized, 4)
  y = quantized(jnp.asarray(x))
  assert y.dtype == jnp.bfloat16
  expected = expected_output(layer, quantized, x, 4)
  # One bfloat16 unit in the last place (2^-8) of outputs below 8.
  np.testing.assert_allclose(
    y.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-7, atol=2**-6
  )
  assert np.abs(np.asarray(y.astype(jnp.float32))).max() > 0.5


def test_a_bfloat16_input_keeps_its_dtype():
  x = jnp.asarray(random(3, 6)).astype(jnp.bfloat16)
  layer = linear(6, 4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  assert quantize(layer, x)(x).dtype == jnp.bfloat16


def test_float_inputs_are_left_alone_without_an_activation_quantizer():
  x = random(5, 6)
  layer = linear(6, 4)
  quantized = quantize(layer, x, activation=None)
  nn.set_bits(quantized, 2)
  scale = np.asarray(quantized.weight_params["scale"][...])
  kernel = quantized_weight(np.asarray(layer.kernel[...]), scale, 2)
  expected = x @ kernel + np.asarray(layer.bias[...])
  np.testing.assert_allclose(
    quantized(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6
  )
  assert not quantized.input_params


def test_integer_inputs_are_quantized_as_the_floats_they_stand_for():
  x = np.arange(12, dtype=np.int32).reshape(3, 4)
  layer = linear(4, 3)
  with jax.numpy_dtype_promotion("standard"):
    quantized = quantize(layer, x)
    nn.set_bits(quantized, 4)
    y = quantized(jnp.asarray(x))
  expected = expected_output(layer, quantized, x.astype(np.float32), 4)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_output_gradient_with_respect_to_the_bias_is_a_count():
  x = random(5, 6)
  quantized = quantize(linear(6, 4), x)
  split = nn.functional(quantized)
  gradient = jax.grad(
    lambda p: split.apply(p, split.batch_stats, 1, jnp.asarray(x))[0].sum()
  )(split.params)
  np.testing.assert_array_equal(gradient["bias"], np.full(4, 5, np.float32))


def test_kernel_gradient_is_the_quantized_input_inside_the_clip_range():
  x = random(5, 6)
  quantized = quantize(linear(6, 4, use_bias=False), x)
  split = nn.functional(quantized)
  gradient = jax.grad(
    lambda p: split.apply(p, split.batch_stats, 2, jnp.asarray(x))[0].sum()
  )(split.params)
  scale = np.asarray(split.params["weight_params"]["scale"])
  w = np.asarray(split.params["kernel"])
  # At 2 bits a level is 2^6 scales wide and codes are -2..1.
  v = w / scale / 64
  inside = (v >= -2) & (v <= 1)
  x_scale = np.asarray(split.params["input_params"]["scale"])[2]
  x_hat = quantized_input(x, x_scale, 2, True)
  expected = np.where(inside, x_hat.sum(0)[:, None], 0)
  np.testing.assert_allclose(gradient["kernel"], expected, rtol=1e-5, atol=1e-6)
  assert inside.any() and not inside.all()


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stored_layers_equal_the_trained_layer_bit_for_bit(kind, dtype):
  x = jnp.asarray(random(3, 5, 5, 4))
  layer = (
    conv(4, 6, size=(3, 3), dtype=dtype)
    if kind == "conv"
    else linear(4, 6, dtype=dtype)
  )
  quantized = quantize(layer, x)
  place = LayerInfo(quantized.name, quantized.order, quantized.macs)
  stored = nn.stored.stored_class(layer)(
    layer,
    place,
    quantized.weight_quantizer,
    quantized.input_quantizer,
    input_params=arrays_of(quantized.input_params),
    weight_arrays=layers.encode(quantized, quantized.kernel[...]),
  )
  for bits in BITS:
    nn.set_bits(quantized, bits)
    nn.set_bits(stored, bits)
    np.testing.assert_array_equal(stored(x), quantized(x))
  held = nnx.to_flat_state(nnx.state(stored, nn.stored.Encoded))
  assert {path[-1]: v.dtype for path, v in held} == {
    "codes": jnp.int8,
    "scale": jnp.float32,
  }
  names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(stored))}
  assert "kernel" not in names
  assert nn.layer_table(stored) == nn.layer_table(quantized)
