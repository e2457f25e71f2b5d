"""Quantizers with other parameters than a scale, or none, in every part of nn.

The methods are made up for these tests: a grid of fixed steps without
parameters, and an activation with an offset as well as a scale.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, quant

BITS = (8, 4)


def straight(value, x):
  """The value, with the gradient of x."""
  return value + (x - jax.lax.stop_gradient(x))


def fixed_weight(bits):
  """Codes of steps of 1/128, their low bits dropped; nothing is learned."""

  def encode(params, w):
    assert params == {}
    codes = jnp.clip(jnp.round(w.astype(jnp.float32) * 128), -128, 127)
    return {"codes": codes.astype(jnp.int8)}

  def decode(encoded, index):
    shift = jnp.asarray([8 - b for b in bits])[index]
    codes = encoded["codes"].astype(jnp.int32) >> shift << shift
    return codes.astype(jnp.float32) / 128

  def fake_quantize(params, w, index):
    w_hat = decode(encode(params, jax.lax.stop_gradient(w)), index)
    return straight(w_hat.astype(w.dtype), w)

  return quant.WeightQuantizer(
    bits=bits,
    init=lambda w: {},
    fake_quantize=fake_quantize,
    encode=encode,
    decode=decode,
    stored_bits=8,
    storage=quant.storage(bits, 8),
  )


def unit_activation(bits, *, signed=None):
  """Inputs in 0..1 without parameters; there is no signed form."""
  if signed:
    raise ValueError("signed must be False, inputs are 0..1")

  def fake_quantize(params, x, index):
    assert params == {}
    top = jnp.asarray([2.0**b - 1 for b in bits])[index]
    return straight(jnp.round(jnp.clip(x, 0, 1) * top) / top, x)

  return quant.ActivationQuantizer(
    bits=bits,
    init=lambda x: {},
    fake_quantize=fake_quantize,
    signed=signed,
    with_sign=lambda signed: unit_activation(bits, signed=signed),
  )


def shifted_activation(bits, *, signed=None):
  """Steps of a learned scale, upward from a learned offset."""

  def init(x):
    # A quarter of the range is clipped, so that the offset has a gradient.
    offset = 0.75 * x.min() + 0.25 * x.max()
    return {"scale": (x.max() - offset)[None] / 255, "offset": offset[None]}

  def fake_quantize(params, x, index):
    scale, offset = params["scale"][0], params["offset"][0]
    step = scale * jnp.asarray([2.0 ** (8 - b) for b in bits])[index]
    codes = jnp.maximum((x - offset) / step, 0)
    return straight(jnp.round(codes), codes) * step + offset

  return quant.ActivationQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    signed=signed,
    with_sign=lambda signed: shifted_activation(bits, signed=signed),
  )


class Net(nnx.Module):
  """conv, norm, relu, conv, norm, mean, linear; skipping the ends."""

  def __init__(self, rngs):
    self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(4, rngs=rngs)
    self.conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
    self.norm2 = nnx.BatchNorm(4, rngs=rngs)
    self.last = nnx.Conv(4, 3, (1, 1), rngs=rngs)
    self.norm3 = nnx.BatchNorm(3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm1(self.stem(x)))
    x = nnx.relu(self.norm2(self.conv(x)))
    return self.norm3(self.last(x))


def images(seed=0):
  x = np.random.default_rng(seed).normal(size=(3, 4, 4, 2))
  return jnp.asarray(x, jnp.float32)


CASES = {
  "float_inputs": (BITS, None),
  "unit_inputs": (BITS, unit_activation),
  "shifted_inputs": (BITS, shifted_activation),
  "one_bit_width": ((8,), unit_activation),
  "one_bit_width_float_inputs": ((8,), None),
}


# All with one kind of norm, and each other kind with some.
NETWORKS = [
  *(("switchable", name) for name in CASES),
  ("shared", "shifted_inputs"),
  ("shared", "one_bit_width"),
  ("transitional", "shifted_inputs"),
  ("transitional", "one_bit_width_float_inputs"),
]


def test_every_kind_of_norm_is_in_a_network():
  assert {norm for norm, _ in NETWORKS} == {*nn.NORMS}


@pytest.fixture(scope="module", params=NETWORKS, ids="-".join)
def model(request):
  norm, name = request.param
  bits, activation = CASES[name]
  return nn.quantize(
    Net(nnx.Rngs(0)),
    weight=fixed_weight(bits),
    activation=activation and activation(bits),
    sample=images(),
    norm=norm,
    skip="stem",
  )


def assignments(model):
  count = len(nn.candidates(model))
  return [(i, j) for i in range(count) for j in range(count)]


def test_set_bits_and_the_functional_view_agree(model):
  split = nn.functional(model)
  apply = jax.jit(split.apply)
  outputs = []
  for index in assignments(model):
    names = ("conv", "last")
    bits = [nn.candidates(model)[i] for i in index]
    other = nnx.clone(model)
    nn.set_bits(other, dict(zip(names, bits, strict=True)))
    assert [row.bits for row in nn.layer_table(other)] == bits
    other.eval()
    y, _ = apply(split.params, split.batch_stats, jnp.asarray(index), images())
    np.testing.assert_allclose(other(images()), y, rtol=1e-5, atol=1e-5)
    outputs.append(np.asarray(y))
  for a, b in zip(outputs, outputs[1:], strict=False):
    assert not np.array_equal(a, b)


def test_the_stored_network_is_the_trained_one(model):
  parts = nn.deployed.parts_of(model)
  for name, part in parts.layers.items():
    packed = part.weight.storage.pack(part.encoded)
    assert packed["codes"].nbytes == getattr(model, name).kernel.size
  stored = nn.functional(nn.deployed.assemble(Net(nnx.Rngs(1)), parts))
  trained = nn.functional(model)
  assert stored.layers == trained.layers == 2
  for index in assignments(model):
    outputs = [
      jax.jit(split.apply)(
        split.params, split.batch_stats, jnp.asarray(index), images()
      )[0]
      for split in (trained, stored)
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_training_reaches_every_parameter(model):
  split = nn.functional(model)

  def loss(params):
    y, stats = split.apply(params, split.batch_stats, 0, images(), train=True)
    return (y * images(1)[..., :1]).sum(), stats

  gradients, stats = jax.jit(jax.grad(loss, has_aux=True))(split.params)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.abs(np.asarray(gradient)).sum() > 0, path
  params = jax.tree.map(lambda p, g: p - 0.01 * g, split.params, gradients)
  other = nnx.clone(model)
  nn.update(other, params=params, batch_stats=stats)
  jax.tree.map(
    np.testing.assert_array_equal, nn.functional(other).params, params
  )
  nn.recalibrate(other, [images(2)])
  again = nn.functional(other).batch_stats
  assert not np.array_equal(again["norm3"]["mean"], stats["norm3"]["mean"])


def test_there_are_no_parameters_where_a_method_has_none(model):
  for name in ("conv", "last"):
    kinds = nn.functional(model).param_labels[name]
    assert "weight_params" not in kinds
    assert kinds.get("input_params", {}) in (
      {},
      {"scale": "scale", "offset": "offset"},
    )


def test_methods_can_be_changed_and_changed_back(model):
  bits = nn.candidates(model)
  learned = nn.requantize(model, weight=quant.lsq(bits))
  assert nn.functional(learned).param_labels["conv"]["weight_params"] == {
    "scale": "scale"
  }
  back = nn.requantize(learned, weight=fixed_weight(bits))
  assert "weight_params" not in nn.functional(back).params["conv"]
  for m in (model, back):
    m.eval()
  np.testing.assert_array_equal(model(images()), back(images()))


def shifted():
  return nn.quantize(
    Net(nnx.Rngs(0)),
    weight=fixed_weight(BITS),
    activation=shifted_activation(BITS),
    sample=images(),
    skip=(),
  )


def test_only_a_scale_is_a_scale_and_other_parameters_are_offsets():
  model = shifted()
  assert type(model.stem.input_params["scale"]) is nn.Scale
  assert type(model.stem.input_params["offset"]) is nn.Offset
  offset = 0.75 * images().min() + 0.25 * images().max()
  np.testing.assert_allclose(
    model.stem.input_params["offset"][...], offset[None], rtol=1e-6
  )
  kinds = nn.functional(model).param_labels["stem"]
  assert kinds["input_params"] == {"scale": "scale", "offset": "offset"}
  assert kinds["kernel"] == "weight" and kinds["bias"] == "vector"


def test_offsets_are_stored_with_their_layer():
  model = shifted()
  for name in ("stem", "conv", "last"):
    layer = getattr(model, name)
    layer.input_params["offset"][...] = jnp.float32([-0.25])
  parts = nn.deployed.parts_of(model)
  assert not [name for name in parts.floats if "params" in name]
  stored = nn.deployed.assemble(Net(nnx.Rngs(1)), parts)
  np.testing.assert_array_equal(
    stored.conv.input_params["offset"][...], np.float32([-0.25])
  )
  model.eval()
  np.testing.assert_allclose(
    stored(images()), model(images()), rtol=1e-5, atol=1e-5
  )


def test_a_missing_sign_matters_only_where_inputs_are_negative():
  options = {
    "weight": fixed_weight(BITS),
    "activation": unit_activation(BITS),
    "sample": images(),
  }
  model = nn.quantize(Net(nnx.Rngs(0)), skip="stem", **options)
  assert [row.signed for row in nn.layer_table(model)] == [False, False]
  message = "input of layer 'stem': signed must be False, inputs"
  with pytest.raises(ValueError, match=message):
    nn.quantize(Net(nnx.Rngs(0)), skip=(), **options)
  positive = options | {"sample": jnp.abs(images())}
  model = nn.quantize(Net(nnx.Rngs(0)), skip=(), **positive)
  assert [row.signed for row in nn.layer_table(model)] == [False] * 3


def test_a_settled_sign_is_used_whatever_the_inputs_are():
  model = nn.quantize(
    Net(nnx.Rngs(0)),
    weight=fixed_weight(BITS),
    activation=unit_activation(BITS, signed=False),
    sample=images(),
    skip=(),
  )
  assert [row.signed for row in nn.layer_table(model)] == [False] * 3


def test_an_error_of_calibration_itself_is_not_hidden():
  def init(x):
    raise ValueError("init: cannot")

  broken = unit_activation(BITS)._replace(init=init, signed=False)
  broken = broken._replace(with_sign=lambda signed: broken)
  with pytest.raises(ValueError, match="init: cannot"):
    nn.quantize(
      Net(nnx.Rngs(0)),
      weight=fixed_weight(BITS),
      activation=broken,
      sample=images(),
    )


def test_a_float_network_has_no_quantized_layers():
  assert nn.functional(Net(nnx.Rngs(0))).layers == 0
