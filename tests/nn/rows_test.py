"""Inputs with a scale for each row: what a row is, in every kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import deploy, nn, quant

BITS = (8, 4)


class Tied(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(9, 5, rngs=rngs)

  def __call__(self, x):
    return self.embed.attend(x)


# What makes a layer, the shape of its input, and axes that one sum runs over.
CASES = {
  "linear": (lambda rngs: nnx.Linear(5, 3, rngs=rngs), (2, 4, 5), (2,)),
  "conv": (
    lambda rngs: nnx.Conv(3, 4, (3, 3), rngs=rngs),
    (2, 6, 5, 3),
    (1, 2, 3),
  ),
  "batched conv": (
    lambda rngs: nnx.Conv(3, 4, (3,), rngs=rngs),
    (2, 4, 6, 3),
    (2, 3),
  ),
  "transposed conv": (
    lambda rngs: nnx.ConvTranspose(3, 4, (3,), rngs=rngs),
    (2, 6, 3),
    (1, 2),
  ),
  "heads": (
    lambda rngs: nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=rngs),
    (2, 5, 2, 3),
    (2, 3),
  ),
  "other axes": (
    lambda rngs: nnx.LinearGeneral((5, 3), 4, axis=(1, 3), rngs=rngs),
    (2, 5, 2, 3),
    (1, 3),
  ),
  "einsum": (
    lambda rngs: nnx.Einsum("btd,dhf->bthf", (5, 2, 3), rngs=rngs),
    (2, 4, 5),
    (2,),
  ),
  "einsum with an ellipsis": (
    lambda rngs: nnx.Einsum("d...h,hdf->...f", (3, 5, 2), rngs=rngs),
    (5, 2, 4, 3),
    (0, 3),
  ),
  "tied": (Tied, (2, 4, 5), (2,)),
  "lora": (
    lambda rngs: nnx.LoRALinear(5, 3, lora_rank=2, rngs=rngs),
    (2, 5),
    (1,),
  ),
}


def quantized(model, sample):
  return nn.quantize(
    model,
    weight=quant.double_rounding(BITS),
    activation=quant.dynamic_activation(BITS),
    sample=sample,
    skip=(),
  )


def converted(name):
  make, shape, axes = CASES[name]
  x = jax.random.normal(jax.random.key(1), shape)
  network = quantized(make(nnx.Rngs(0)), x)
  (found,) = nn.quantized.quantized_layers(network).values()
  return network, found, x, axes


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_what_one_sum_of_the_layer_runs_over(name):
  _, layer, x, axes = converted(name)
  size = np.abs(x).max(axes, keepdims=True)
  for index, high in enumerate((127, 7)):
    found = np.asarray(layer._quantize_input(x, index))
    codes = np.round(x * (high / size))
    np.testing.assert_allclose(found, codes * size / high, rtol=1e-5, atol=1e-6)
    assert np.abs(found - x).max() <= np.max(size) / high * 0.501


INTEGER = ("linear", "conv", "batched conv", "heads", "other axes")


@pytest.mark.parametrize("name", INTEGER)
def test_integers_with_a_factor_for_each_row_are_the_fake_quantized_layer(name):
  network, layer, x, _ = converted(name)
  scales = jnp.geomspace(0.1, 10, x.shape[0])
  x *= scales.reshape(-1, *[1] * (x.ndim - 1))
  outputs = {}
  for backend in ("float", "integer", "carrier"):
    model = nnx.clone(network)
    nn.set_backend(model, backend)

    def loss(model, x):
      y = model(x)
      return jnp.square(y).mean(), y

    gradient_of = nnx.value_and_grad(loss, argnums=1, has_aux=True)
    (_, y), gradient = nnx.jit(gradient_of)(model, x)
    outputs[backend] = y, gradient
  expected, slope = outputs.pop("float")
  for y, gradient in outputs.values():
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


class Net(nnx.Module):
  """Norms on the very outputs of layers, which are merged into the rescale."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_an_artifact_has_no_input_scales_and_gives_the_same_outputs(tmp_path):
  float_network = Net(nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
  network = quantized(float_network, x)
  signs = {row.name: row.signed for row in nn.layer_table(network)}
  assert signs == {"conv": True, "head": False}
  network.eval()
  deploy.save(tmp_path / "model", network)
  for bits in BITS:
    nn.set_bits(network, bits)
    expected = network(x)
    for backend in ("float", "integer"):
      stored = deploy.load(
        tmp_path / "model", model=float_network, bits=bits, backend=backend
      )
      np.testing.assert_allclose(stored(x), expected, rtol=1e-4, atol=1e-5)
  assert not any(
    layer.input_params
    for layer in nn.quantized.quantized_layers(stored).values()
  )
