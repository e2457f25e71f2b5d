"""Integer backends: exact accumulators, and the values of the float layers."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import models, nn, quant
from dr_jax.nn import backends, integer_call

BITS = (8, 4, 2)
INTEGER = [
  name
  for name, backend in nn.BACKENDS.items()
  if isinstance(backend, backends.Backend)
]
every_backend = pytest.mark.parametrize("name", INTEGER)


def integers(shape, low, high, dtype, seed=0):
  """Random codes with both ends of their range."""
  values = np.random.default_rng(seed).integers(low, high + 1, shape)
  values.flat[0], values.flat[1] = low, high
  return values.astype(dtype)


def exact_convolution(x, w, convolution):
  """A convolution in int64, tap by tap."""
  strides, padding, lhs_dilation, rhs_dilation, groups, _ = convolution
  n, *size, c_in = x.shape
  *window, inner, c_out = w.shape
  dilated = [(s - 1) * d + 1 for s, d in zip(size, lhs_dilation, strict=True)]
  padded = np.zeros(
    (
      n,
      *(s + lo + hi for s, (lo, hi) in zip(dilated, padding, strict=True)),
      c_in,
    ),
    np.int64,
  )
  place = tuple(
    slice(lo, lo + s, d)
    for (lo, _), s, d in zip(padding, dilated, lhs_dilation, strict=True)
  )
  padded[(slice(None), *place)] = x
  outputs = [
    (s - (k - 1) * d - 1) // stride + 1
    for s, k, d, stride in zip(
      padded.shape[1:-1], window, rhs_dilation, strides, strict=True
    )
  ]
  y = np.zeros((n, *outputs, c_out), np.int64)
  for tap in np.ndindex(*window):
    seen = padded[
      (
        slice(None),
        *(
          slice(t * d, t * d + (o - 1) * stride + 1, stride)
          for t, d, o, stride in zip(
            tap, rhs_dilation, outputs, strides, strict=True
          )
        ),
      )
    ]
    for group in range(groups):
      ins = slice(group * inner, (group + 1) * inner)
      outs = slice(group * c_out // groups, (group + 1) * c_out // groups)
      y[..., outs] += seen[..., ins] @ w[tap][:, outs].astype(np.int64)
  return y


def convolution(rank=2, **options):
  plain = {
    "strides": (1,) * rank,
    "padding": ((1, 1),) * rank,
    "lhs_dilation": (1,) * rank,
    "rhs_dilation": (1,) * rank,
  }
  return backends.Convolution(**(plain | options))


# Inputs [n, *size, c_in], kernel [*window, c_in / groups, c_out].
CONVOLUTIONS = {
  "plain": ((2, 7, 6, 5), (3, 3, 5, 4), convolution()),
  "pointwise": (
    (2, 4, 5, 6),
    (1, 1, 6, 3),
    convolution(padding=((0, 0),) * 2, strides=(2, 2)),
  ),
  "strided": ((1, 9, 8, 3), (5, 3, 3, 4), convolution(strides=(2, 3))),
  "dilated": ((1, 9, 8, 3), (3, 2, 3, 4), convolution(rhs_dilation=(2, 3))),
  "dilated inputs": (
    (1, 5, 4, 3),
    (3, 3, 3, 2),
    convolution(lhs_dilation=(2, 3)),
  ),
  "uneven padding": (
    (1, 6, 5, 3),
    (3, 3, 3, 4),
    convolution(padding=((0, 2), (3, 1)), strides=(2, 1)),
  ),
  "grouped": ((2, 6, 5, 6), (3, 3, 2, 9), convolution(groups=3)),
  "depthwise": ((2, 6, 5, 4), (3, 3, 1, 4), convolution(groups=4)),
  "depthwise with a multiplier": (
    (2, 6, 5, 4),
    (3, 2, 1, 8),
    convolution(groups=4, strides=(2, 1)),
  ),
  "one axis": ((2, 9, 4), (3, 4, 5), convolution(rank=1, padding=((2, 0),))),
  "three axes": ((1, 4, 3, 5, 2), (2, 1, 3, 2, 3), convolution(rank=3)),
}


def operands(x_shape, w_shape, dtype):
  limits = np.iinfo(dtype)
  x = integers(x_shape, limits.min, limits.max, dtype)
  return x, integers(w_shape, -128, 127, "int8", seed=1)


@every_backend
def test_accumulators_of_convolutions_are_exact(name):
  cases = {
    (case, dtype): operands(*CONVOLUTIONS[case][:2], dtype)
    for case in CONVOLUTIONS
    for dtype in ("uint8", "int8")
  }

  @jax.jit
  def convolve(cases):  # one program: each compiles as long as all of them
    return {
      key: nn.BACKENDS[name].convolve(x, w, CONVOLUTIONS[key[0]][2])
      for key, (x, w) in cases.items()
    }

  for key, acc in convolve(cases).items():
    expected = exact_convolution(*cases[key], CONVOLUTIONS[key[0]][2])
    np.testing.assert_array_equal(acc, expected, err_msg=str(key))


@every_backend
def test_accumulators_of_products_are_exact(name):
  for dtype in ("uint8", "int8"):
    x, w = operands((3, 5, 70), (70, 9), dtype)
    acc = nn.BACKENDS[name].multiply(x, w, 1)
    np.testing.assert_array_equal(acc, x.astype(np.int64) @ w.astype(np.int64))


@every_backend
def test_sums_beyond_exact_floats_are_exact(name):
  x = np.full((2, 3, 3, 700), 255, np.uint8)
  x[0] = 254
  w = np.full((3, 3, 700, 2), 127, np.int8)
  w[..., 1] = -127
  w[0, 0, 0, 1] = -126
  options = convolution(chunks=9 * 700 * 127 * 255 // 2**24 + 1)
  acc = nn.BACKENDS[name].convolve(x, w, options)
  expected = exact_convolution(x, w, options)
  assert abs(expected).max() > 2**24
  np.testing.assert_array_equal(acc, expected)


class Layers(nnx.Module):
  """Layers that differ in what Flax does around the convolution.

  Without nnx.relu, whose gradient at zero hangs on the last bit of a sum.
  """

  def __init__(self, rngs):
    bias_init = nnx.initializers.normal()  # zeros would hide them

    def conv(c_in, c_out, size, **options):
      options["bias_init"] = bias_init
      return nnx.Conv(c_in, c_out, size, rngs=rngs, **options)

    self.same = conv(3, 8, (3, 3), strides=2)
    self.norm1 = nnx.BatchNorm(8, rngs=rngs)
    self.depthwise = conv(
      8, 8, (3, 3), feature_group_count=8, padding="CIRCULAR"
    )
    self.norm2 = nnx.BatchNorm(8, rngs=rngs)
    self.dilated = conv(
      8, 6, (3, 3), kernel_dilation=2, padding=((2, 1), (0, 2)), use_bias=False
    )
    self.masked = conv(
      6, 6, (2, 2), padding="VALID", mask=jnp.ones((2, 2, 6, 6)).at[0].set(0)
    )
    self.causal = conv(6, 4, (3,), padding="CAUSAL")
    self.linear = nnx.Linear(4, 5, bias_init=bias_init, rngs=rngs)

  def __call__(self, x):
    y = self.norm1(self.same(x))
    y = nnx.softplus(y) + 0.1 * jnp.tanh(y)
    z = self.depthwise(y)
    y = nnx.softplus(self.norm2(z)) + z  # z is used besides the norm
    y = nnx.softplus(self.dilated(y))
    y = self.masked(y)
    y = self.causal(y)  # the rows are a second batch axis
    return self.linear(y.mean(1))


def images(seed=0):
  return jax.random.normal(jax.random.key(seed), (4, 12, 12, 3))


def program(model):
  """Outputs for `images(1)` at a position in the bits, compiled once."""
  split = nn.functional(model)

  @jax.jit
  def outputs(index):
    return split.apply(split.params, split.batch_stats, index, images(1))[0]

  return outputs


def call(model, x):
  return nnx.jit(lambda model, x: model(x))(model, x)


@pytest.fixture(scope="module")
def trained():
  network = nn.quantize(
    Layers(nnx.Rngs(0)),
    weight=quant.double_rounding(BITS, rounding="half_up"),
    activation=quant.lsq_activation(BITS),
    sample=images(),
    skip=(),
  )
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.recalibrate(network, [images(bits)])
  network.eval()
  return network


@pytest.fixture(scope="module")
def stored(trained):
  float_network = Layers(nnx.Rngs(0))
  return nn.deployed.assemble(float_network, nn.deployed.parts_of(trained))


@pytest.mark.parametrize(
  "kind, name",
  [("trained", "integer"), ("stored", "im2col"), ("stored", "carrier")],
)
def test_networks_compute_what_the_float_layers_do(kind, name, request):
  float_network = request.getfixturevalue(kind)
  network = nnx.clone(float_network)
  nn.set_backend(network, name)
  call, expected = program(network), program(float_network)
  for index in range(len(BITS)):
    # Sums of products of float32 in another order.
    np.testing.assert_allclose(
      call(index), expected(index), rtol=1e-4, atol=1e-5
    )


def test_one_compilation_serves_every_assignment(stored):
  network = nnx.clone(stored)
  nn.set_backend(network, "integer")
  split = nn.functional(network)
  traces = []

  @jax.jit
  def apply(batch_stats, index, x):
    traces.append(index)
    return split.apply(split.params, batch_stats, index, x)[0]

  for index in (0, 2, np.arange(6) % 3):
    apply(split.batch_stats, jnp.full(6, index, jnp.int32), images())
  assert len(traces) == 1


def test_a_norm_on_a_layers_output_is_merged_into_its_rescale(
  stored, monkeypatch
):
  network = nnx.clone(stored)
  nn.set_backend(network, "integer")
  merged = []
  normalized = integer_call.Accumulators.normalized

  def recorded(accumulators, gain, offset):
    merged.append(accumulators.acc.shape)
    return normalized(accumulators, gain, offset)

  monkeypatch.setattr(integer_call.Accumulators, "normalized", recorded)
  nnx.eval_shape(network, images())
  assert merged == [(4, 6, 6, 8)] * 2


def test_no_array_outlives_a_call(stored):
  network = nnx.clone(stored)
  nn.set_backend(network, "integer")
  with jax.checking_leaks():
    call(network, images())
  gc.collect()
  assert not integer_call._OUTPUTS


@pytest.mark.parametrize(
  "name", ["integer", pytest.param("carrier", marks=pytest.mark.slow)]
)
def test_training_in_integers_has_the_gradients_of_the_float_layers(
  trained, name
):
  def gradients(backend):
    network = nnx.clone(trained)
    nn.set_backend(network, backend)
    nn.set_bits(network, 4)
    split = nn.functional(network)

    def loss(params):
      y, _ = split.apply(params, split.batch_stats, 1, images())
      return jnp.square(y).sum()

    return jax.jit(jax.value_and_grad(loss))(split.params)

  value, found = gradients(name)
  expected_value, expected = gradients("float")
  np.testing.assert_allclose(value, expected_value, rtol=1e-4)
  flat = jax.tree_util.tree_leaves_with_path(expected)
  for (path, want), got in zip(flat, jax.tree.leaves(found), strict=True):
    largest = float(jnp.abs(want).max())
    np.testing.assert_allclose(
      got, want, atol=1e-4 * largest, rtol=0, err_msg=str(path)
    )
  assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize(
  "method", ["adabits", "any_precision", "bitwave", "lsq", "ternary"]
)
def test_methods_with_integers_compute_in_them(method):
  weight = quant.get(method)
  x = images()
  network = nn.quantize(
    nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)),
    weight=weight,
    activation=quant.lsq_activation(weight.bits),
    sample=x,
    skip=(),
  )
  expected = network(x)
  nn.set_backend(network, "carrier")
  np.testing.assert_allclose(network(x), expected, rtol=1e-4, atol=1e-5)


def test_auto_takes_the_fastest_backend_that_was_measured(stored, monkeypatch):
  network = nnx.clone(stored)
  seconds = nn.time_backends(network, images(), rounds=1)
  assert set(seconds) == {"float", *INTEGER}
  assert list(seconds.values()) == sorted(seconds.values())
  layer = next(iter(nn.quantized.quantized_layers(network).values()))
  for fastest in ("im2col", "float"):
    monkeypatch.setattr(
      "dr_jax.nn.backend_choice.time_backends",
      lambda *_, fastest=fastest: {fastest: 0.1, "integer": 0.2},
    )
    nn.set_backend(network, "auto", sample=images())
    assert layer.backend is nn.BACKENDS[fastest]


def quantized_linear(weight, activation):
  return nn.quantize(
    nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
    weight=weight,
    activation=activation,
    sample=jnp.ones((1, 4)),
    skip=(),
  )


@pytest.mark.parametrize(
  "weight, activation, name, message",
  [
    ("double_rounding", None, "carrier", "its inputs stay float"),
    ("float_weight", "lsq_activation", "carrier", "values of float_weight are"),
    ("lsq", "lsq_plus_activation", "carrier", "values of lsq_plus_activation"),
    ("any_precision", "lsq_activation", "integer", "int8 or uint8, got int16"),
    ("lsq", "lsq_activation", "int4", "backend must be one of"),
    ("lsq", "lsq_activation", "auto", "sample must be inputs"),
  ],
)
def test_a_backend_that_cannot_compute_is_one_line(
  weight, activation, name, message
):
  network = quantized_linear(
    quant.get(weight), activation and quant.get(activation)
  )
  with pytest.raises(ValueError, match=message) as raised:
    nn.set_backend(network, name)
  assert "\n" not in str(raised.value)
  assert network.backend is None


def test_a_float_network_has_no_backend():
  with pytest.raises(ValueError, match="must have a quantized layer"):
    nn.set_backend(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "integer")


@pytest.mark.slow
@pytest.mark.parametrize(
  "model, options",
  [
    ("resnet18", {"width": 8}),
    ("mobilenetv2", {}),
  ],
)
def test_published_networks_compute_in_integers(model, options):
  x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  float_network = models.build(
    model, num_classes=10, rngs=nnx.Rngs(0), **options
  )
  trained = nn.quantize(
    float_network,
    weight=quant.double_rounding(BITS, rounding="floor"),
    activation=quant.lsq_activation(BITS),
    sample=x,
  )
  network = nn.deployed.assemble(float_network, nn.deployed.parts_of(trained))
  nn.set_bits(network, 4)
  expected = call(network, x)
  nn.set_backend(network, "carrier")
  # A code on the edge between two can fall to either side.
  largest = float(jnp.abs(expected).max())
  np.testing.assert_allclose(call(network, x), expected, atol=0.02 * largest)
