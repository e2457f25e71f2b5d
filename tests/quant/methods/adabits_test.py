"""AdaBits and PACT against integer tables, formulas and the references."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant
from dr_jax.quant.core.tanh_normalize import normalized
from tests.support.drift import drift

EVERY = (8, 7, 6, 5, 4, 3, 2, 1)
SCHEMES = ("modified", "centered", "original")
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def rounded(u, bits, scheme):
  """q_b(u) in float64."""
  u = np.asarray(u, np.float64)
  if scheme == "original":
    top = 2**bits - 1
    return np.rint(top * u) / top
  codes = np.minimum(np.floor(2**bits * u), 2**bits - 1)
  return (codes + (0.5 if scheme == "centered" else 0)) / 2**bits


def away_from_steps(u, bits, scheme):
  """Where float32 and float64 cannot differ about the code."""
  v = u * (2**bits - 1) - 0.5 if scheme == "original" else u * 2**bits
  return np.abs(v - np.rint(v)) > 1e-3


def over_bits(quantizer, w, g):
  """Values and gradients for w at every bit-width, each [B, ...]."""

  def one(w, g, index):
    out, pull = jax.vjp(lambda w: quantizer.fake_quantize({}, w, index), w)
    return out, *pull(g)

  run = jax.jit(jax.vmap(one, (None, None, 0)))
  return map(np.asarray, run(w, g, jnp.arange(len(quantizer.bits))))


@pytest.mark.parametrize("scheme", ["modified", "centered"])
def test_every_lower_code_is_an_arithmetic_shift_of_the_stored_one(scheme):
  quantizer = quant.adabits(EVERY, scheme=scheme)
  codes = np.arange(-128, 128)
  # Middles of the cells of 8 bits; the saturated weight makes M = 1.
  w = np.append(np.arctanh((codes + 0.5) / 128), 50.0).astype(np.float32)
  encoded = quantizer.encode({}, w[:, None])
  assert set(encoded) == {"codes"}
  assert encoded["codes"].dtype == jnp.int8
  np.testing.assert_array_equal(encoded["codes"][:-1, 0], codes)
  assert encoded["codes"][-1, 0] == 127
  center = 0.5 if scheme == "centered" else 0
  decode = jax.jit(jax.vmap(quantizer.decode, (None, 0)))
  values = decode(encoded, jnp.arange(len(EVERY)))
  for i, bits in enumerate(EVERY):
    expected = ((codes >> (8 - bits)) + center) / 2 ** (bits - 1)
    np.testing.assert_array_equal(values[i, :-1, 0], expected)
    assert len(np.unique(values[i])) == 2**bits


def test_few_weights_by_hand():
  r = [-1, -0.76, -0.75, -0.5, -0.01, 0.01, 0.49, 0.51, 0.74, 0.76]
  inner = np.arctanh(np.array(r[1:]) + 1e-6)
  w = np.concatenate([[-50.0], inner]).astype(np.float32)[:, None]
  third = 1 / 3
  expected = {
    ("modified", 2): [-1, -1, -1, -0.5, -0.5, 0, 0, 0.5, 0.5, 0.5],
    ("modified", 1): [-1, -1, -1, -1, -1, 0, 0, 0, 0, 0],
    ("centered", 2): [-3, -3, -3, -1, -1, 1, 1, 3, 3, 3],
    ("centered", 1): [-0.5] * 5 + [0.5] * 5,
    ("original", 2): [-1, -1, -1, -third, -third, third, third, third, 1, 1],
    ("original", 1): [-1.0] * 5 + [1.0] * 5,
  }
  for (scheme, bits), values in expected.items():
    factor = 4 if (scheme, bits) == ("centered", 2) else 1
    quantizer = quant.adabits((bits,), scheme=scheme)
    found = quantizer.fake_quantize({}, w, 0)[:, 0]
    close(found * factor, values, err_msg=f"{scheme} {bits}")


@pytest.mark.parametrize(
  ("shape", "scheme", "rescale"),
  [
    *(
      ((3, 3, 5, 6), scheme, rescale)
      for scheme in SCHEMES
      for rescale in (False, True, "stddev")
    ),
    ((40, 30), SCHEMES[0], True),
  ],
)
def test_values_and_gradients_match_a_float64_formula(shape, scheme, rescale):
  rng = np.random.default_rng(len(shape))
  w = (rng.normal(size=shape) / 3).astype(np.float32)
  g = rng.normal(size=shape).astype(np.float32)
  quantizer = quant.adabits(EVERY, scheme=scheme, rescale=rescale)
  outs, dws = over_bits(quantizer, w, g)
  w64 = w.astype(np.float64)
  t = np.tanh(w64)
  largest = np.abs(t).max()
  u = (t / largest + 1) / 2
  dt = g / largest
  at = np.unravel_index(np.abs(t).argmax(), t.shape)
  dt[at] -= np.sign(t[at]) * (g * t).sum() / largest**2
  target = 1 / math.sqrt(math.prod(shape[:-2]) * shape[-1])
  if rescale == "stddev":
    target = w64.std(ddof=1)
  for i, bits in enumerate(EVERY):
    w_q = 2 * rounded(u, bits, scheme) - 1
    away = away_from_steps(u, bits, scheme)
    assert away.mean() > 0.98
    gain = target / w_q.std(ddof=1) if rescale else 1
    # One code that differs would move the gain by less than this.
    rtol = 1e-4 if rescale else 1e-5
    close(outs[i][away], (w_q * gain)[away], rtol=rtol)
    # The same at every bit-width but for the gain.
    close(dws[i], gain * (1 - t**2) * dt, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("rescale, spread", [(True, None), ("stddev", 0.3)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rescaled_weights_have_the_requested_spread(scheme, rescale, spread):
  rng = np.random.default_rng(0)
  w = (0.3 * rng.normal(size=(3, 3, 7, 16))).astype(np.float32)
  spread = spread and w.std(ddof=1)
  quantizer = quant.adabits((8, 4, 2, 1), scheme=scheme, rescale=rescale)
  encoded = quantizer.encode({}, w)
  assert encoded["gain"].shape == (4,)
  assert encoded["gain"].dtype == jnp.float32
  for i in range(4):
    found = np.asarray(quantizer.fake_quantize({}, w, i))
    expected = spread or 1 / math.sqrt(3 * 3 * 16)
    assert found.std(ddof=1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rescale", [True, "stddev"])
def test_a_large_kernel_is_deployed_with_the_gains_of_training(rescale):
  w = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
  quantizer = quant.adabits((8, 2), rescale=rescale)
  encoded = quantizer.encode({}, w)
  for i in range(2):
    np.testing.assert_array_equal(
      quantizer.decode(encoded, i), quantizer.fake_quantize({}, w, i)
    )


@pytest.mark.parametrize("rescale", [True, "stddev"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 0.7, -3e38])
def test_a_constant_tensor_is_not_rescaled(value, scheme, rescale):
  w = np.full((4, 8), value, np.float32)
  plain = quant.adabits(scheme=scheme)
  quantizer = quant.adabits(scheme=scheme, rescale=rescale)
  encoded = quantizer.encode({}, w)
  np.testing.assert_array_equal(encoded["gain"], np.ones(4))
  for i in range(4):
    np.testing.assert_array_equal(
      quantizer.fake_quantize({}, w, i), plain.fake_quantize({}, w, i)
    )


def test_the_original_scheme_stores_floats_and_the_others_codes():
  w = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
  original = quant.adabits((7, 4), scheme="original")
  encoded = original.encode(original.init(w), w)
  assert set(encoded) == {"weight"}
  np.testing.assert_array_equal(encoded["weight"], normalized(w))
  assert original.stored_bits == 32
  for scheme in ("modified", "centered"):
    quantizer = quant.adabits((7, 4), scheme=scheme, rescale=True)
    encoded = quantizer.encode(quantizer.init(w), w)
    assert quantizer.stored_bits == 7
    sizes = [quantizer.storage.size(encoded, i) for i in range(2)]
    assert sizes == [w.size * 7 // 8 + 8, w.size // 2 + 8]


@pytest.mark.parametrize("scheme", ["modified", "centered"])
def test_low_precision_weights_are_computed_in_float32(scheme):
  w = np.random.default_rng(0).normal(size=(16, 5))
  w = jnp.asarray(w, jnp.bfloat16)
  quantizer = quant.adabits(scheme=scheme)
  for i in range(4):
    expected = quantizer.fake_quantize({}, w.astype(jnp.float32), i)
    np.testing.assert_array_equal(
      quantizer.fake_quantize({}, w, i), expected.astype(jnp.bfloat16)
    )


@pytest.mark.parametrize(
  "options, message",
  [
    ({"bits": (8, 0)}, r"bits of adabits .*from 8 down to 1.*\(8, 0\)"),
    ({"scheme": "floor"}, "scheme .*modified.*centered.*original.*got 'floor'"),
    (
      {"rescale": "constant"},
      "rescale .*False, True, 'stddev', got 'constant'",
    ),
  ],
)
def test_adabits_names_the_wrong_option(options, message):
  with pytest.raises(ValueError, match=message):
    quant.adabits(**options)


@functools.cache
def pact(bits, **options):
  """The quantizer, and a program: its value and gradients for clips and x."""
  quantizer = quant.pact_activation(bits, **options)

  @jax.jit
  def clipped(clip, x, g, index):
    out, pull = jax.vjp(
      lambda c, x: quantizer.fake_quantize({"clip": c}, x, index), clip, x
    )
    return out, *pull(g)

  return quantizer, clipped


@pytest.mark.parametrize("clip", [4.0, -4.0])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_activations_and_gradients_match_the_formulas_at_and_beyond_the_ends(
  scheme, signed, clip
):
  _, clipped = pact(EVERY, scheme=scheme, signed=signed)
  low = -4.0 if signed else 0.0
  ends = np.array([low, 4.0], np.float32)
  neighbors = np.array([-1e-37, 1e-37], np.float32)
  if signed:
    neighbors = np.nextafter(ends, np.array([-9, 9], np.float32))
  x = np.random.default_rng(0).uniform(low - 2, 6, 400)
  x = np.concatenate([x, ends, neighbors, [-3e38, 3e38]]).astype(np.float32)
  g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  inside = (x >= low) & (x <= 4)
  z = x.astype(np.float64) / 4
  u = np.clip((z + 1) / 2 if signed else z, 0, 1)
  for index, bits in enumerate(EVERY):
    clips = jnp.full((8,), 9.0).at[index].set(clip)
    out, dclip, dx = clipped(clips, x, g, jnp.int32(index))
    q = rounded(u, bits, scheme)
    q = 2 * q - 1 if signed else q
    away = away_from_steps(u, bits, scheme)
    away |= (u == 0) | (u == 1)
    away[400:] = True  # the ends are exact
    assert away.mean() > 0.98
    out, dclip = np.asarray(out), np.asarray(dclip)
    close(out[away], 4 * q[away])
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))
    # Elements near a step, as the quantizer has decided them.
    slope = np.where(away, q, out / 4) - np.where(inside, z, 0)
    close(dclip[index] * np.sign(clip), (g * slope).sum(), atol=1e-4)
    assert (np.delete(dclip, index) == 0).all()


def test_clip_levels_start_at_the_requested_value():
  x = np.array([[1.0, -5.5], [2.0, 3.0]], np.float32)
  for initial, expected in ((8.0, 8.0), (10, 10.0), (None, 5.5)):
    quantizer = quant.pact_activation((8, 2), initial=initial, signed=True)
    clip = quantizer.init(x)["clip"]
    np.testing.assert_array_equal(clip, [expected] * 2)
    assert clip.dtype == jnp.float32
  np.testing.assert_array_equal(
    quant.pact_activation((8, 2), signed=False).init(x)["clip"], [8, 8]
  )
  zeros = quant.pact_activation((8, 2), initial=None, signed=False)
  assert (zeros.init(np.zeros_like(x))["clip"] > 0).all()


@pytest.mark.parametrize("raw", [-1e38, -3.0, -0.0, 0.0, 1e-38, 1e38])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("signed", [False, True])
def test_any_finite_clip_level_is_read_as_a_positive_one(signed, scheme, raw):
  x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
  quantizer, clipped = pact((8, 1), scheme=scheme, signed=signed)
  read = float(np.clip(abs(raw), quant.SCALE_MIN, quant.SCALE_MAX))
  for index in range(2):
    found = clipped(jnp.full((2,), raw), x, x, jnp.int32(index))
    assert all(np.isfinite(leaf).all() for leaf in found)
    expected = quantizer.fake_quantize({"clip": jnp.full(2, read)}, x, index)
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_clip_level_of_zero_has_the_gradient_of_a_positive_one(zero):
  _, clipped = pact((4,), signed=False)
  x, g = np.array([1.0, 2.0, -1.0], "f4"), np.array([3.0, 4.0, 5.0], "f4")
  _, dclip, dx = clipped(jnp.array([zero]), x, g, jnp.int32(0))
  np.testing.assert_array_equal(dclip, [7])
  np.testing.assert_array_equal(dx, [0, 0, 0])


@pytest.mark.parametrize("optimizer, rate", [("sgd", 10.0), ("adam", 0.5)])
def test_learning_rates_100_times_too_large_keep_clip_levels_finite(
  optimizer, rate
):
  x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
  quantizer = quant.pact_activation(initial=1.0, signed=True)

  def loss(params, index):
    out = quantizer.fake_quantize(params, x, index)
    return (out**2).sum(), out

  _, finite, lowest = drift(
    loss,
    quantizer.init(x),
    optimizer,
    rate,
    candidates=4,
    watch=lambda params: params["clip"].min(),
  )
  assert finite.all()
  # A level did go below zero: its magnitude is what is read.
  assert lowest.min() < 0


def test_pact_quantizer_without_a_sign_raises():
  undecided = quant.pact_activation((8, 4), scheme="modified", initial=6)
  assert undecided.signed is None
  with pytest.raises(
    ValueError, match="signed must be True or False, got None"
  ):
    undecided.init(jnp.ones(3))
  with pytest.raises(ValueError, match="signed must be .* got None.*with_sign"):
    undecided.fake_quantize({"clip": jnp.ones(2)}, jnp.ones(3), 0)
  for sign in (True, False):
    decided = undecided.with_sign(sign)
    assert decided.signed is sign
    assert dict(decided.options) == {
      "bits": (8, 4),
      "scheme": "modified",
      "initial": 6.0,
      "signed": sign,
    }
  with pytest.raises(
    ValueError, match="activation must be finite.*1 of 2 values are NaN"
  ):
    decided.init(jnp.array([1.0, jnp.inf]))


@pytest.mark.parametrize(
  "options, message",
  [
    ({"bits": (9, 4)}, r"bits of pact_activation .*from 8.*\(9, 4\)"),
    ({"scheme": "floor"}, "scheme .*modified.*centered.*original.*got 'floor'"),
    ({"initial": 0.0}, "initial must be None or a number.*got 0.0"),
    ({"initial": -8}, "initial must be None or a number.*got -8"),
    ({"initial": "max"}, "initial must be None or a number.*got 'max'"),
    ({"initial": math.nan}, "initial must be None or a number.*got nan"),
  ],
)
def test_pact_names_the_wrong_option(options, message):
  with pytest.raises(ValueError, match=message):
    quant.pact_activation(**options)


def reference_bits(arrays):
  return tuple(int(b) for b in arrays["bits"])


def clipped_over_bits(quantizer, clips, x, g):
  """Values and gradients, each [B, ...], for rows clips[i] of levels."""

  def one(clip, x, g, index):
    out, pull = jax.vjp(
      lambda c, x: quantizer.fake_quantize({"clip": c}, x, index), clip, x
    )
    return out, *pull(g)

  run = jax.jit(jax.vmap(one, (None, None, None, 0)))
  return map(np.asarray, run(clips, x, g, jnp.arange(len(quantizer.bits))))


@pytest.mark.parametrize("name", ["edge", "conv", "lin"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_matches_the_reference_with_ties(golden, scheme, name):
  """With a = 1, x_hat is q_b(x)."""
  arrays = golden("adabits.npz")
  bits = reference_bits(arrays)
  u = arrays[f"qk.{name}.in"]
  g = u if name == "edge" else arrays[f"qk.{name}.gout"]
  quantizer = quant.pact_activation(bits, scheme=scheme, signed=False)
  ones = np.ones(len(bits), np.float32)
  outs, _, dxs = clipped_over_bits(quantizer, ones, u, g)
  for i, b in enumerate(bits):
    close(outs[i], arrays[f"qk.{name}.{scheme}.b{b}.out"])
    np.testing.assert_array_equal(dxs[i], g)


AXES = {"conv": (2, 3, 1, 0), "lin": (1, 0)}  # to HWIO


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_and_gradients_match_the_reference(golden, scheme, name):
  arrays = golden("adabits.npz")
  bits = reference_bits(arrays)
  w, g = (arrays[f"w.{name}.{k}"].transpose(AXES[name]) for k in ("in", "gout"))
  outs, dws = over_bits(quant.adabits(bits, scheme=scheme), w, g)
  for i, b in enumerate(bits):
    key = f"w.{name}.{scheme}.b{b}"
    close(outs[i], arrays[f"{key}.out"].transpose(AXES[name]))
    close(dws[i], arrays[f"{key}.gin"].transpose(AXES[name]))


@pytest.mark.parametrize("name, mode", [("conv", ""), ("lin", ".train")])
@pytest.mark.parametrize("kind, rescale", [("constant", True), ("stddev",) * 2])
def test_rescaled_weights_and_gradients_match_the_reference(
  golden, kind, rescale, name, mode
):
  """The float branch is not a bit-width here: its gain is that of r itself."""
  arrays = golden("adabits.npz")
  bits = reference_bits(arrays)
  w, g = (arrays[f"w.{name}.{k}"].transpose(AXES[name]) for k in ("in", "gout"))
  outs, dws = over_bits(quant.adabits(bits, rescale=rescale), w, g)
  r = np.asarray(jax.jit(normalized)(w))
  target = 1 / math.sqrt(math.prod(w.shape[:-2]) * w.shape[-1])
  if kind == "stddev":
    target = w.std(ddof=1)
  gain = np.float32(target / r.std(ddof=1))
  pull = jax.jit(lambda w, g: jax.vjp(normalized, w)[1](g)[0])
  outs, dws = [*outs, r * gain], [*dws, pull(w, g * gain)]
  for i, b in enumerate([*bits, 32]):
    key = f"w.{name}.modified.sat_{kind}{mode}.b{b}"
    close(outs[i], arrays[f"{key}.out"].transpose(AXES[name]))
    close(dws[i], arrays[f"{key}.gin"].transpose(AXES[name]))


def test_the_reference_moves_the_gain_to_the_bias_when_it_evaluates(golden):
  """Left out: logits without the gain, and a bias over it, rank alike.

  A quantizer here has one set of weights, which serve as they were trained.
  """
  arrays = golden("adabits.npz")
  bits = reference_bits(arrays)
  w = arrays["w.lin.in"].T
  plain = quant.adabits(bits)
  encoded = quant.adabits(bits, rescale=True).encode({}, w)
  for i, b in enumerate(bits):
    key = f"w.lin.modified.sat_constant.eval.b{b}"
    close(plain.fake_quantize({}, w, i), arrays[f"{key}.out"].T)
    bias = arrays["w.lin.bias.in"] / encoded["gain"][i]
    close(bias, arrays[f"{key}.bias_out"])
  r = normalized(w)
  key = "w.lin.modified.sat_constant.eval.b32"
  close(r, arrays[f"{key}.out"].T)
  bias = arrays["w.lin.bias.in"] * (4 * r.std(ddof=1))  # 4 = sqrt(c_out)
  close(bias, arrays[f"{key}.bias_out"])


@pytest.mark.parametrize(
  "kind, scheme, signed",
  [
    ("map.scl", "original", False),
    ("map.scl", "modified", False),
    ("map.scl_double_side", "original", True),
    ("vec.shared", "original", False),
    ("vec.shared", "modified", False),
  ],
)
def test_activations_and_gradients_match_the_reference(
  golden, kind, scheme, signed
):
  arrays = golden("adabits.npz")
  bits = reference_bits(arrays)
  name = kind.split(".")[0]
  x, g = arrays[f"a.{name}.in"], arrays[f"a.{name}.gout"]
  shared = kind == "vec.shared"
  clips = np.full(7, 2.1, np.float32) if shared else arrays["a.alpha.in"]
  quantizer = quant.pact_activation(bits, scheme=scheme, signed=signed)
  outs, dclips, dxs = clipped_over_bits(quantizer, clips, x, g)
  for i, b in enumerate(bits):
    key = f"a.{kind}.{scheme}.b{b}"
    close(outs[i], arrays[f"{key}.out"])
    close(dxs[i], arrays[f"{key}.gin"])
    # A float32 sum of some 300 terms.
    expected = arrays[f"{key}.galpha"]
    found = dclips[i].sum() if shared else dclips[i]
    close(found, expected, atol=1e-5)


def test_a_convolution_and_its_gradients_match_the_reference(golden):
  arrays = golden("adabits.npz")
  bits = reference_bits(arrays)
  weights = quant.adabits(bits)
  inputs = quant.pact_activation(bits, signed=False)
  w = arrays["w.conv.in"].transpose(2, 3, 1, 0)
  x, g = (arrays[f"layer.{k}"].transpose(0, 2, 3, 1) for k in ("in", "gout"))

  def layer(w, clip, x, index):
    return jax.lax.conv_general_dilated(
      inputs.fake_quantize({"clip": clip}, x, index),
      weights.fake_quantize({}, w, index),
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  @jax.jit
  def run(w, clip, x, g, index):
    out, pull = jax.vjp(lambda *a: layer(*a, index), w, clip, x)
    return out, *pull(g)

  for i, b in enumerate(bits):
    out, dw, dclip, dx = run(w, arrays["a.alpha.in"], x, g, jnp.int32(i))
    # Sums of 27 to 36 float32 products, and of those once more.
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    near(out, arrays[f"layer.b{b}.out"].transpose(0, 2, 3, 1))
    near(dx, arrays[f"layer.b{b}.gin"].transpose(0, 2, 3, 1))
    near(dw, arrays[f"layer.b{b}.gw"].transpose(2, 3, 1, 0))
    near(dclip, arrays[f"layer.b{b}.galpha"])
