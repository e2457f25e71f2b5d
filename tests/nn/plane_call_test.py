"""Weight-only linear layers that read bit-planes: the values of float layers.

The law that integer backends keep, too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, quant
from dr_jax.deploy.export.specialize import specialize

BITS = (8, 4, 2)


class Layers(nnx.Module):
  """A linear network with and without a bias, and rows that fill no word."""

  def __init__(self, rngs, dtype=None):
    options = {"dtype": dtype, "rngs": rngs}
    self.first = nnx.Linear(40, 24, **options)
    self.second = nnx.Linear(24, 70, use_bias=False, **options)
    self.third = nnx.Linear(70, 5, **options)

  def __call__(self, x):
    return self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))


def inputs(*batch):
  return jax.random.normal(jax.random.key(len(batch)), (*batch, 40))


def deployed(weight, model=None):
  model = model or Layers(nnx.Rngs(0))
  network = nn.quantize(model, weight=weight, sample=inputs(2), skip=())
  return nn.deployed.assemble(model, nn.deployed.parts_of(network))


def call(network, x):
  return nnx.jit(lambda network, x: network(x))(network, x)


@pytest.fixture(scope="module", params=["half_up", "floor"])
def stored(request):
  return deployed(quant.double_rounding(BITS, rounding=request.param))


def test_networks_compute_what_the_float_layers_do(stored):
  network = nnx.clone(stored)
  nn.set_backend(network, "planes")
  split, float_split = nn.functional(network), nn.functional(stored)
  run, float_run = (
    jax.jit(lambda *args, s=s: s.apply(s.params, s.batch_stats, *args)[0])
    for s in (split, float_split)
  )
  for x in (inputs(1), inputs(2, 3)):
    for index in range(len(BITS)):
      # Sums of products of float32 in another order.
      np.testing.assert_allclose(
        run(jnp.int32(index), x),
        float_run(jnp.int32(index), x),
        rtol=1e-4,
        atol=1e-5,
      )
  # Of two shapes; no bit-width compiles. JAX may have dropped one.
  assert run._cache_size() <= 2


def test_a_bit_width_that_is_a_python_int_is_computed_alone(stored):
  network = nnx.clone(stored)
  nn.set_backend(network, "planes")
  layer = network.second
  nn.set_bits(network, 4)
  x = jnp.ones((1, 24))
  expected = layer(x)
  layer.bits.set_value(1)
  np.testing.assert_allclose(layer(x), expected, rtol=1e-6)
  program = str(jax.make_jaxpr(layer)(x))
  assert "cond" not in program and "pallas" not in program


def test_planes_are_kept_in_place_of_codes(stored):
  network = nnx.clone(stored)
  nn.set_backend(network, "planes")
  for layer, before in zip(
    nn.quantized.quantized_layers(network).values(),
    nn.quantized.quantized_layers(stored).values(),
    strict=True,
  ):
    assert set(layer.encoded) == {"planes", "scale"}
    k, n = before.encoded["codes"].shape
    assert layer.encoded["planes"].shape == (8, -(-k // 32), n)
    np.testing.assert_array_equal(layer.kernel, before.kernel)
  nn.set_backend(network, "float")
  state, expected = nnx.state(network), nnx.state(stored)
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_missing_planes_are_not_kept_and_give_no_numbers(stored):
  network = nnx.clone(stored)
  for layer in nn.quantized.quantized_layers(network).values():
    layer.first = 1
  nn.set_backend(network, "planes")
  rounding = dict(network.first.weight_quantizer.options)["rounding"]
  count = 5 if rounding == "half_up" else 4
  assert len(network.first.encoded["planes"]) == count
  nn.set_bits(network, 4)
  nn.set_bits(stored, 4)
  np.testing.assert_allclose(
    call(network, inputs(2)), call(stored, inputs(2)), rtol=1e-4, atol=1e-5
  )
  for layer in nn.quantized.quantized_layers(network).values():
    layer.bits.set_value(jnp.int32(0))
  assert jnp.isnan(call(network, inputs(2))).all()
  network.first.bits.set_value(0)
  with pytest.raises(ValueError, match="bits of first must be at most 4"):
    network.first(inputs(2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_layers_of_half_precision_keep_their_dtype(dtype):
  weight = quant.double_rounding(BITS, rounding="floor")
  network = deployed(weight, Layers(nnx.Rngs(0), jnp.dtype(dtype)))
  nn.set_bits(network, 4)
  expected = call(network, inputs(3))
  nn.set_backend(network, "planes")
  y = call(network, inputs(3))
  assert y.dtype == expected.dtype == dtype
  # Every layer rounds its outputs to at least 8 bits of precision.
  np.testing.assert_allclose(
    y.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.1, atol=0.02
  )


def test_auto_measures_planes_of_weight_only_networks(stored):
  seconds = nn.time_backends(stored, inputs(2), rounds=1)
  assert set(seconds) == {"float", "planes"}


def test_networks_for_one_bit_width_compute_in_floats_again(stored):
  network = nnx.clone(stored)
  nn.set_backend(network, "planes")
  y = specialize(network, 4)(inputs(2))
  np.testing.assert_array_equal(y, specialize(stored, 4)(inputs(2)))


@pytest.mark.parametrize(
  "model, weight, activation, message",
  [
    (
      nnx.Conv(40, 4, (1,), rngs=nnx.Rngs(0)),
      quant.double_rounding(BITS, rounding="floor"),
      None,
      "it is not linear",
    ),
    (
      None,
      quant.double_rounding(BITS, rounding="floor"),
      quant.lsq_activation(BITS),
      "its inputs are quantized",
    ),
    (
      None,
      quant.double_rounding(BITS),
      None,
      "rounding 'half_even' needs all planes",
    ),
    (None, quant.bit_mixer(), None, "codes of bit_mixer are not planes"),
    (
      None,
      quant.double_rounding(BITS, rounding="floor", shared=False),
      None,
      "codes of double_rounding are not planes of shared ones",
    ),
    (
      nnx.Linear(40, 4, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)),
      quant.double_rounding(BITS, rounding="floor"),
      None,
      "its product has a dtype of its own",
    ),
  ],
)
def test_a_layer_without_planes_is_one_line(model, weight, activation, message):
  model = model or nnx.Linear(40, 4, rngs=nnx.Rngs(0))
  network = nn.quantize(
    model,
    weight=weight,
    activation=activation,
    sample=jnp.ones((1, 1, 40)),
    skip=(),
  )
  stored = nn.deployed.assemble(model, nn.deployed.parts_of(network))
  with pytest.raises(ValueError, match=message) as raised:
    nn.set_backend(stored, "planes")
  assert "\n" not in str(raised.value)
  assert not nn.supports(stored, "planes")


def test_layers_in_training_have_no_planes():
  network = nn.quantize(
    Layers(nnx.Rngs(0)),
    weight=quant.double_rounding(BITS, rounding="floor"),
    sample=inputs(2),
    skip=(),
  )
  with pytest.raises(ValueError, match="layer first: it has a float kernel"):
    nn.set_backend(network, "planes")
