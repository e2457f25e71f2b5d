"""Einsum layers that a package defines itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import deploy, nn, quant
from dr_jax.nn.contraction import base_of

BITS = (8, 4, 2)
SHAPES = {
  "btd,dnh->btnh": ((2, 5, 6), (6, 2, 3)),
  "btnh,nhd->btd": ((2, 5, 2, 3), (2, 3, 6)),
  "btd,sndh->sbtnh": ((2, 5, 6), (3, 2, 6, 4)),
  "...tm,md->...td": ((2, 5, 6), (6, 4)),
}


class Own(nnx.Module):
  """As public language models define it."""

  def __init__(self, einsum_str, kernel):
    self.einsum_str = einsum_str
    self.w = nnx.Param(kernel)

  def __call__(self, x):
    return jnp.einsum(self.einsum_str, x, self.w[...])


class Holder(nnx.Module):
  def __init__(self, layer):
    self.layer = layer

  def __call__(self, x):
    return self.layer(x)


def random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def quantize(model, x):
  return nn.quantize(
    model,
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=x,
    skip=(),
  )


def both(einsum_str):
  """The layer of a package, Flax's with the same kernel, and an input."""
  x, kernel = (random(*s, seed=i) for i, s in enumerate(SHAPES[einsum_str]))
  flax = nnx.Einsum(einsum_str, kernel.shape, rngs=nnx.Rngs(0))
  flax.kernel[...] = kernel
  return Holder(Own(einsum_str, kernel)), Holder(flax), x


@pytest.mark.parametrize("einsum_str", SHAPES)
def test_it_is_quantized_as_flax_quantizes_its_own(einsum_str, tmp_path):
  *models, x = both(einsum_str)
  own, flax = (quantize(model, x) for model in models)
  (row,), (expected,) = nn.layer_table(own), nn.layer_table(flax)
  assert row == expected
  deploy.save(tmp_path / "own", own)
  stored = deploy.load(tmp_path / "own", model=both(einsum_str)[0])
  for index, bits in enumerate(BITS):
    for network in (own, flax, stored):
      nn.set_bits(network, bits)
    np.testing.assert_array_equal(own(x), flax(x))
    np.testing.assert_array_equal(stored(x), flax(x))
    by = [gradients(network, index, x) for network in (own, flax)]
    np.testing.assert_array_equal(by[0]["w"], by[1]["kernel"])
    assert np.any(by[0]["w"])


def gradients(network, index, x):
  split = nn.functional(network)

  def loss(params):
    return jnp.square(split.apply(params, split.batch_stats, index, x)[0]).sum()

  return jax.jit(jax.grad(loss))(split.params)["layer"]


class Cast(Own):
  def __call__(self, x):
    x, w = x.astype(jnp.bfloat16), self.w[...].astype(jnp.bfloat16)
    return jnp.einsum(self.einsum_str, x, w)


class Scaled(Own):
  def __call__(self, x):
    return 2 * super().__call__(x)


class Other(Own):
  def __call__(self, x):
    return jnp.einsum("btd,ed->bte", x, self.w[...])


class Masked(Own):
  def __call__(self, x, mask):
    return super().__call__(x * mask)


class Biased(Own):
  def __init__(self, *args):
    super().__init__(*args)
    self.bias = nnx.Param(jnp.zeros(()))


@pytest.mark.parametrize(
  ("kind", "einsum_str", "known"),
  [
    (Own, "btd,de->bte", True),
    (Cast, "btd,de->bte", True),
    (Scaled, "btd,de->bte", False),
    (Other, "btd,de->bte", False),
    (Masked, "btd,de->bte", False),
    (Biased, "btd,de->bte", False),
    (Own, "btd,d...->bt...", False),
    (Own, "btd,def->btef", False),
    (Own, "de", False),
    (Own, None, False),
  ],
)
def test_only_a_call_that_is_the_einsum_is_taken_for_one(
  kind, einsum_str, known
):
  layer = kind(einsum_str, random(6, 6))
  assert (base_of(layer) is not None) == known


def test_layers_of_a_stack_have_scales_and_bits_each():
  kernels = random(3, 6, 6, seed=1)
  x = random(2, 5, 6)

  class Stack(nnx.Module):
    def __init__(self, layer):
      self.layer = layer

    def __call__(self, x):
      def step(x, layer):
        return layer(x), None

      return nnx.scan(step)(x, self.layer)[0]

  flax = nnx.Einsum("btd,de->bte", (6, 6), rngs=nnx.Rngs(0))
  flax.kernel = nnx.Param(kernels)
  own, expected = (
    quantize(Stack(layer), x) for layer in (Own("btd,de->bte", kernels), flax)
  )
  assert [r.name for r in nn.layer_table(own)] == [
    f"layer/{i}" for i in range(3)
  ]
  for network in (own, expected):
    nn.set_bits(network, {"layer/0": 8, "layer/1": 2, "layer/2": 4})
  np.testing.assert_array_equal(own(x), expected(x))
