"""LSQ against exact rounding, hand-derived gradients and PyTorch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant


def ends(bits: int, signed: bool) -> tuple[float, float]:
  if signed:
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
  return 0.0, 2.0**bits - 1


def reference(x, scale, g, bits, signed):
  """Float64 value and gradients of one scale shared by the whole of x."""
  x, scale, g = (np.asarray(a, np.float64) for a in (x, scale, g))
  low, high = ends(bits, signed)
  v = x / scale
  code = np.clip(np.rint(v), low, high)
  inside = (v >= low) & (v <= high)
  slope = np.where(v < low, low, np.where(v > high, high, code - v))
  dscale = (g * slope).sum() / math.sqrt(x.size * high)
  return code * scale, np.where(inside, g, 0), dscale


def value_and_gradients(x, scale, g, bits, signed):
  @jax.jit
  def run(x, scale, g):
    out, pull = jax.vjp(
      lambda x, s: quant.fake_quantize(x, s, bits, signed=signed), x, scale
    )
    return out, *pull(g)

  return run(x, scale, g)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quantize_and_its_gradients_match_the_formulas(bits, signed):
  low, high = ends(bits, signed)
  v = np.arange(low - 4, high + 4.25, 0.25, dtype=np.float32)
  edges = np.array([low, high, high + 0.5, 0.5, 1.5], np.float32)
  edges = np.concatenate([edges, [low - 0.5]]).astype(np.float32)
  neighbors = edges[edges != 0]
  v = np.concatenate(
    [
      v,
      edges,
      np.nextafter(neighbors, -np.inf),
      np.nextafter(neighbors, np.inf),
    ]
  ).astype(np.float32)
  scale = np.float32(2.0**-3)  # v is then exact
  x = v * scale
  g = np.random.default_rng(bits).normal(size=x.shape).astype(np.float32)
  out, dx, dscale = value_and_gradients(x, scale, g, bits, signed)
  expected = reference(x, scale, g, bits, signed)
  np.testing.assert_array_equal(out, expected[0].astype(np.float32))
  np.testing.assert_array_equal(dx, expected[1].astype(np.float32))
  # A float32 sum of terms as large as the end codes.
  terms = np.abs(g).sum() * max(high, -low) / math.sqrt(x.size * high)
  np.testing.assert_allclose(dscale, expected[2], rtol=1e-5, atol=1e-6 * terms)


def test_fake_quantize_accepts_a_scale_per_channel_or_per_row():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(6, 5)).astype(np.float32)
  g = rng.normal(size=(6, 5)).astype(np.float32)
  column = np.exp(rng.normal(size=(1, 5))).astype(np.float32) / 8
  out, dx, dscale = value_and_gradients(x, column, g, 4, True)
  row = value_and_gradients(x.T, column.T, g.T, 4, True)
  np.testing.assert_array_equal(row[0], out.T)
  np.testing.assert_array_equal(row[1], dx.T)
  np.testing.assert_allclose(row[2], dscale.T, rtol=1e-6)
  for c in range(5):
    one = reference(x[:, c], column[0, c], g[:, c], 4, True)
    np.testing.assert_allclose(out[:, c], one[0], rtol=1e-6)
    np.testing.assert_array_equal(dx[:, c], one[1].astype(np.float32))
    np.testing.assert_allclose(dscale[0, c], one[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_shape", [(5,), (2, 1), (6, 5, 1), (12, 5)])
def test_fake_quantize_rejects_a_scale_that_does_not_fit(scale_shape):
  with pytest.raises(ValueError) as error:
    quant.fake_quantize(jnp.ones((6, 5)), jnp.ones(scale_shape), 4)
  assert str(scale_shape) in str(error.value)
  assert "(6, 5)" in str(error.value)


@pytest.mark.parametrize("bits", [1, 9, 2.5])
def test_fake_quantize_names_a_wrong_bit_width(bits):
  with pytest.raises(
    ValueError, match=rf"bits must be an integer in 2\.\.8, got {bits}"
  ):
    quant.fake_quantize(jnp.ones(3), jnp.float32(1), bits)


@pytest.mark.parametrize("per_channel", [True, False])
def test_every_bit_width_has_its_own_scale(per_channel):
  bits = (8, 5, 4, 2)
  rng = np.random.default_rng(0)
  w = rng.normal(size=(3, 3, 4, 6)).astype(np.float32)
  quantizer = quant.lsq(bits, per_channel=per_channel)
  params = quantizer.init(w)
  axes = (0, 1, 2) if per_channel else (0, 1, 2, 3)
  mean = np.abs(w.astype(np.float64)).mean(axes, keepdims=True)
  expected = [2 * mean / math.sqrt(2 ** (b - 1) - 1) for b in bits]
  assert params["scale"].dtype == jnp.float32
  np.testing.assert_allclose(params["scale"], np.stack(expected), rtol=1e-5)

  def total(params, index):
    out = quantizer.fake_quantize(params, w, index)
    return out.sum(), out

  run = jax.vmap(jax.grad(total, has_aux=True), (None, 0))
  gradients, outs = jax.jit(run)(params, jnp.arange(4))
  for i, b in enumerate(bits):
    per_scale = np.abs(gradients["scale"][i]).reshape(4, -1).sum(1)
    assert list(np.flatnonzero(per_scale)) == [i]
    np.testing.assert_array_equal(
      outs[i], quant.fake_quantize(w, params["scale"][i], b)
    )


def test_several_bit_widths_store_floats_and_a_single_one_stores_codes():
  w = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  several, single = quant.lsq((8, 4)), quant.lsq((4,))
  encoded = several.encode(several.init(w), w)
  assert several.stored_bits == 32
  np.testing.assert_array_equal(encoded["weight"], w)
  encoded = single.encode(single.init(w), w)
  assert single.stored_bits == 4
  assert encoded["codes"].dtype == jnp.int8
  assert int(encoded["codes"].min()) >= -8
  assert int(encoded["codes"].max()) <= 7


def test_activation_scales_start_at_twice_the_mean_over_root_of_the_top_code():
  x = np.random.default_rng(0).normal(size=(16, 9)).astype(np.float32)
  mean = np.abs(x.astype(np.float64)).mean()
  for signed in (True, False):
    quantizer = quant.lsq_activation((8, 4, 2), signed=signed)
    tops = [ends(b, signed)[1] for b in (8, 4, 2)]
    np.testing.assert_allclose(
      quantizer.init(x)["scale"], 2 * mean / np.sqrt(tops), rtol=1e-5
    )


def test_unsigned_activations_send_negative_inputs_to_zero_without_gradient():
  quantizer = quant.lsq_activation((2,), signed=False)
  params = {"scale": jnp.array([0.5])}
  x = jnp.array([-1.0, -1e-6, 0.0, 0.6, 1.5, 1.6])
  out, pull = jax.vjp(lambda x: quantizer.fake_quantize(params, x, 0), x)
  np.testing.assert_array_equal(out, [0, 0, 0, 0.5, 1.5, 1.5])
  np.testing.assert_array_equal(pull(jnp.ones(6))[0], [0, 0, 1, 1, 1, 0])


def test_activation_quantizer_without_a_sign_raises():
  quantizer = quant.lsq_activation((8, 4))
  assert quantizer.signed is None
  with pytest.raises(
    ValueError, match="signed must be True or False, got None"
  ):
    quantizer.init(jnp.ones(3))
  with pytest.raises(ValueError, match="signed must be .* got None.*with_sign"):
    quantizer.fake_quantize({"scale": jnp.ones(2)}, jnp.ones(3), 0)
  for sign in (True, False):
    decided = quantizer.with_sign(sign)
    assert decided.signed is sign
    assert decided.bits == (8, 4)
    assert dict(decided.options)["signed"] is sign


def every_bit_width(x, scales, g, bits, signed):
  """Value and gradients with a scale per bit-width, each [B, ...]."""
  quantizer = quant.lsq_activation(bits, signed=signed)

  def one(scales, x, g, index):
    out, pull = jax.vjp(
      lambda s, x: quantizer.fake_quantize({"scale": s}, x, index), scales, x
    )
    dscales, dx = pull(g)
    return out, dx, dscales[index]

  run = jax.jit(jax.vmap(one, (None, None, None, 0)))
  return map(np.asarray, run(scales, x, g, jnp.arange(len(bits))))


@pytest.mark.parametrize("name", ["conv", "lin"])
@pytest.mark.parametrize("kind, signed", [("w", True), ("a", False)])
def test_values_and_gradients_match_pytorch_except_for_its_mask(
  golden, kind, signed, name
):
  """PyTorch masks on round(v), LSQ on v: they part within half a step."""
  arrays = golden("lsq_torch_builtin.npz")
  bits = tuple(sorted(map(int, arrays["bits"]), reverse=True))
  keys = [f"{kind}.{name}.b{b}" for b in bits]
  x, g = arrays[f"{kind}.{name}.in"], arrays[f"gout.{name}"]
  scales = np.array([arrays[f"{key}.scale"] for key in keys])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  outs, dxs, dscales = every_bit_width(x, scales, g, bits, signed)
  for i, (b, key) in enumerate(zip(bits, keys, strict=True)):
    low, high = ends(b, signed)
    v = x.astype(np.float64) / scales[i]
    parted = (v < low) & (np.rint(v) >= low)
    parted |= (v > high) & (np.rint(v) <= high)
    # On these inputs only 2-bit weights are that near to the ends.
    assert parted.any() == (kind == "w" and b == 2)
    close(outs[i], arrays[f"{key}.out"])
    # There PyTorch passes the gradient, and takes round(v) - v for the scale.
    theirs = arrays[f"{key}.gin"]
    np.testing.assert_array_equal(dxs[i][parted], 0)
    np.testing.assert_array_equal(theirs[parted], g[parted])
    close(dxs[i][~parted], theirs[~parted])
    factor = 1 / math.sqrt(x.size * high)
    close(arrays[f"{key}.gradscale"], factor)
    close(dscales[i], arrays[f"{key}.gscale"] + factor * (g * v)[parted].sum())
