"""Any-Precision against float64 formulas, hand-made tables and references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant
from dr_jax.quant.core.tanh_normalize import normalized

EVERY = (8, 7, 6, 5, 4, 3, 2, 1)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def over_bits(quantizer, x, g):
  """Values and gradients for x at every bit-width, each [B, ...]."""

  def one(x, g, index):
    out, pull = jax.vjp(lambda x: quantizer.fake_quantize({}, x, index), x)
    return out, *pull(g)

  run = jax.jit(jax.vmap(one, (None, None, 0)))
  return map(np.asarray, run(x, g, jnp.arange(len(quantizer.bits))))


def saturated(values):
  """Weights [n, 1] whose r are `values`: a saturated one makes M = 1."""
  inner = np.arctanh(np.clip(np.asarray(values, np.float64), -0.9999, 0.9999))
  w = np.where(np.abs(values) == 1, 50 * np.sign(values), inner)
  return np.append(w, 50.0).astype(np.float32)[:, None]


@pytest.mark.parametrize("index", range(8))
def test_every_level_is_an_odd_multiple_of_the_mean_over_n(index):
  n = 2 ** EVERY[index] - 1
  codes = np.arange(n + 1)
  w = saturated(2 * codes / n - 1)
  mean = np.abs(w.astype(np.float64)).mean()
  fake_quantize = jax.jit(quant.any_precision(EVERY).fake_quantize)
  found = fake_quantize({}, w, jnp.int32(index))[:-1, 0]
  np.testing.assert_allclose(found, mean * (2 * codes - n) / n, rtol=1e-6)
  assert len(np.unique(found)) == n + 1


def test_weights_by_hand_at_two_bits_and_one():
  w = saturated([-1, -0.7, -0.65, -0.01, 0.01, 0.65, 0.7])
  size = np.float32(np.abs(w).mean())
  two, one = (
    quant.any_precision((2, 1)).fake_quantize({}, w, i)[:-1, 0] / size
    for i in range(2)
  )
  third = 1 / 3
  close(two, [-1, -1, -third, -third, third, third, 1])
  close(one, [-1, -1, -1, -1, 1, 1, 1])


@pytest.mark.parametrize("shape", [(3, 3, 5, 6), (40, 30)])
def test_weights_and_gradients_match_a_float64_formula(shape):
  rng = np.random.default_rng(len(shape))
  w = rng.normal(size=shape).astype(np.float32) / 3
  g = rng.normal(size=shape).astype(np.float32)
  outs, dws = over_bits(quant.any_precision(EVERY), w, g)
  t = np.tanh(w.astype(np.float64))
  largest, size = np.abs(t).max(), np.abs(w.astype(np.float64)).mean()
  dt = g / largest
  at = np.unravel_index(np.abs(t).argmax(), t.shape)
  dt[at] -= np.sign(t[at]) * (g * t).sum() / largest**2
  for i, bits in enumerate(EVERY):
    n = 2**bits - 1
    v = n * (t / largest + 1) / 2
    # Nothing near a tie, where float32 and float64 may differ.
    away = np.abs(v % 1 - 0.5) > 1e-3
    assert away.mean() > 0.98
    close(outs[i][away], (size * (2 * np.rint(v) / n - 1))[away])
    # The same at every bit-width: straight through the rounding.
    close(dws[i], size * (1 - t**2) * dt)


def test_normalized_weights_and_their_mean_are_what_is_stored():
  w = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
  quantizer = quant.any_precision((8, 4))
  encoded = quantizer.encode(quantizer.init(w), w)
  assert set(encoded) == {"weight", "size"}
  assert quantizer.stored_bits == 32
  np.testing.assert_array_equal(encoded["weight"], normalized(w))
  close(encoded["size"], [[np.abs(w.astype(np.float64)).mean()]])
  # A copy for one bit-width holds codes and the mean.
  sizes = [quantizer.storage.size(encoded, i) for i in range(2)]
  assert sizes == [w.size + 4, w.size // 2 + 4]


@pytest.mark.parametrize("signed", [False, True])
def test_unit_activations_and_gradients_match_the_formula_on_all_codes(signed):
  bits = EVERY[:-1] if signed else EVERY
  low = -1 if signed else 0
  quantizer = quant.unit_activation(bits, signed=signed)

  @jax.jit
  def run(x, g, index):
    out, pull = jax.vjp(lambda x: quantizer.fake_quantize({}, x, index), x)
    return out, *pull(g)

  for index, b in enumerate(bits):
    n = 2 ** (b - 1 if signed else b) - 1
    codes = np.arange(low * n, n + 1)
    # Each code, and what is just nearer to it than to its neighbors.
    x = np.concatenate([codes / n, (codes + 0.49) / n, (codes - 0.49) / n])
    x = np.concatenate([x, [-7.0, 7.0, 3e38, -3e38]]).astype(np.float32)
    g = np.random.default_rng(b).normal(size=x.shape).astype(np.float32)
    out, dx = run(x, g, jnp.int32(index))
    ends = np.clip(np.tile(codes, 3), low * n, n)
    expected = np.concatenate([ends / n, [low, 1, 1, low]])
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    inside = (x >= low) & (x <= 1)
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))


def test_unit_activations_pass_the_gradient_at_both_ends_but_not_beyond():
  ends = np.array([0.0, 1.0], np.float32)
  outward = np.array([-1e-37, np.nextafter(1, np.float32(2))], np.float32)
  inward = np.nextafter(ends, np.float32(0.5))
  x = np.concatenate([ends, [-0.0], outward, inward]).astype(np.float32)
  quantizer = quant.unit_activation((2,), signed=False)
  out, pull = jax.vjp(lambda x: quantizer.fake_quantize({}, x, 0), x)
  np.testing.assert_array_equal(out, [0, 1, 0, 0, 1, 0, 1])
  (dx,) = pull(np.ones(7, np.float32))
  np.testing.assert_array_equal(dx, [1, 1, 1, 0, 0, 1, 1])


def test_unit_activations_have_no_parameters_and_raise_without_a_sign():
  quantizer = quant.unit_activation((8, 1))
  assert quantizer.signed is None
  with pytest.raises(
    ValueError, match="signed must be True or False, got None"
  ):
    quantizer.init(jnp.ones(3))
  with pytest.raises(ValueError, match="signed must be .* got None.*with_sign"):
    quantizer.fake_quantize({}, jnp.ones(3), 0)
  decided = quantizer.with_sign(False)
  assert decided.signed is False
  assert decided.init(jnp.ones(3)) == {}
  assert dict(decided.options) == {"bits": (8, 1), "signed": False}
  with pytest.raises(
    ValueError, match="activation must be finite.*1 of 2 values are NaN"
  ):
    decided.init(jnp.array([1.0, jnp.nan]))


@pytest.mark.parametrize(
  "build, message",
  [
    (
      lambda: quant.any_precision((8, 0)),
      r"bits of any_precision .*from 8 down to 1.*\(8, 0\)",
    ),
    (
      lambda: quant.unit_activation((4, 4)),
      r"bits of unit_activation .*from 8 down to 1.*\(4, 4\)",
    ),
    (
      lambda: quant.unit_activation((8, 1)).with_sign(True),
      r"unit_activation with signed=True .* 8 down to 2.*\(8, 1\)",
    ),
  ],
)
def test_wrong_bits_are_an_error_that_names_the_method(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def reference_bits(arrays):
  return tuple(int(b) for b in arrays["bits"] if b != 32)


@pytest.mark.parametrize("name", ["conv", "lin"])
def test_weights_and_gradients_match_the_reference(golden, name):
  arrays = golden("any_precision.npz")
  bits = reference_bits(arrays)
  axes = (2, 3, 1, 0) if name == "conv" else (1, 0)
  w, g = (arrays[f"w.{name}.{key}"].transpose(axes) for key in ("in", "gout"))
  quantizer = quant.any_precision(bits)
  size = quantizer.encode({}, w)["size"]
  close(size.reshape(()), arrays[f"w.{name}.E"])
  outs, dws = over_bits(quantizer, w, g)
  for i, b in enumerate(bits):
    close(outs[i], arrays[f"w.{name}.b{b}.out"].transpose(axes))
    close(dws[i], arrays[f"w.{name}.b{b}.gin"].transpose(axes))


@pytest.mark.parametrize("name", ["map", "vec"])
def test_activations_and_gradients_match_the_reference(golden, name):
  arrays = golden("any_precision.npz")
  bits = reference_bits(arrays)
  x, g = arrays[f"a.{name}.in"], arrays[f"a.{name}.gout"]
  # Edges: the gradient passes at 0, 1 and -0.
  np.testing.assert_array_equal(x.reshape(-1)[:3], [0, 1, 0])
  outs, dxs = over_bits(quant.unit_activation(bits, signed=False), x, g)
  for i, b in enumerate(bits):
    close(outs[i], arrays[f"a.{name}.b{b}.out"])
    np.testing.assert_array_equal(dxs[i], arrays[f"a.{name}.b{b}.gin"])


def test_ties_round_as_in_the_reference(golden):
  arrays = golden("any_precision.npz")
  bits = reference_bits(arrays)
  x = arrays["qfn.edge.in"]
  outs, _ = over_bits(quant.unit_activation(bits, signed=False), x, x)
  for i, b in enumerate(bits):
    close(outs[i], arrays[f"qfn.edge.b{b}.out"])


def normalize_batch(x, weight, bias):
  mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
  axes = (0, 1, 2)
  centered = x - jnp.expand_dims(mean, axes)
  factor = jnp.expand_dims(weight / jnp.sqrt(variance + 1e-5), axes)
  return centered * factor + jnp.expand_dims(bias, axes), (mean, variance)


def convolve(x, w, stride, padding):
  return jax.lax.conv_general_dilated(
    x,
    w,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


@pytest.mark.parametrize("bits", [32, 8, 4, 2, 1])
def test_a_residual_block_and_its_gradients_match_the_reference(golden, bits):
  """Pre-activation, stride 2; at 32 bits weights are E r, behind a ReLU."""
  arrays = golden("any_precision.npz")
  if bits == 32:
    activate = jax.nn.relu

    def quantize(w):
      return normalized(w) * jax.lax.stop_gradient(jnp.abs(w).mean())

  else:
    weights = quant.any_precision((bits,))
    inputs = quant.unit_activation((bits,), signed=False)

    def activate(x):
      return inputs.fake_quantize({}, x, 0)

    def quantize(w):
      return weights.fake_quantize({}, w, 0)

  def block(params, x):
    x, _ = normalize_batch(x, *params["bn0"])
    x = activate(x)
    shortcut = convolve(x, params["skip_conv"], 2, 0)
    shortcut, _ = normalize_batch(shortcut, *params["skip_bn"])
    x = convolve(x, quantize(params["conv0"]), 2, 1)
    x, moments = normalize_batch(x, *params["bn1"])
    x = convolve(activate(x), quantize(params["conv1"]), 1, 1)
    return x + shortcut, moments

  convolutions = ("conv0", "conv1", "skip_conv")
  params = {
    name: arrays[f"block.param.{name}.weight"].transpose(2, 3, 1, 0)
    for name in convolutions
  }
  for name, size in {"bn0": 3, "bn1": 4, "skip_bn": 4}.items():
    params[name] = (np.ones(size, np.float32), np.zeros(size, np.float32))
  x, g = (arrays[f"block.{k}"].transpose(0, 2, 3, 1) for k in ("in", "gout"))

  @jax.jit
  def run(params, x, g):
    out, pull, moments = jax.vjp(block, params, x, has_aux=True)
    return out, moments, *pull(g)

  out, (mean, variance), dparams, dx = run(params, x, g)
  key = f"block.b{bits}"
  # Sums of up to 144 float32 products, normalized twice.
  near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
  near(out, arrays[f"{key}.out"].transpose(0, 2, 3, 1))
  near(dx, arrays[f"{key}.gin"].transpose(0, 2, 3, 1))
  for name in convolutions:
    expected = arrays[f"{key}.grad.{name}.weight"].transpose(2, 3, 1, 0)
    near(dparams[name], expected)
  for name in ("bn0", "bn1", "skip_bn"):
    near(dparams[name][0], arrays[f"{key}.grad.{name}.weight"])
    if name != "skip_bn":
      near(dparams[name][1], arrays[f"{key}.grad.{name}.bias"])
  count = out.size / out.shape[-1]
  near(0.1 * mean, arrays[f"{key}.bn1.running_mean"])
  unbiased = variance * count / (count - 1)
  near(0.9 + 0.1 * unbiased, arrays[f"{key}.bn1.running_var"])
