"""Multi-resolution quantization against float64 formulas and the reference."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant


def naf_terms(m):
  terms, weight = [], 1
  while m:
    if m % 2:
      digit = 2 - m % 4
      terms.append(digit * weight)
      m -= digit
    m, weight = m // 2, 2 * weight
  return terms[::-1]


def flax_layout(x):
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def torch_layout(x):
  return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


def golden_cases(arrays, kind):
  """Yields name, scale and budgets of "w" (weights) or "a"."""
  budgets = {}
  for key in arrays:
    found = re.fullmatch(
      rf"{kind}\.(\w+)\.[wa]5\.alpha([\d.]+)\.k(\d+)\.out", key
    )
    if found:
      budgets.setdefault(found.groups()[:2], []).append(int(found[3]))
  for (name, scale), ks in budgets.items():
    yield name, scale, sorted(ks, reverse=True)


def every_budget(quantizer, scale, x, g):
  """Values and gradients at all budgets, each [B, ...]."""

  def one(scale, x, g, index):
    out, pull = jax.vjp(
      lambda s, x: quantizer.fake_quantize({"scale": s}, x, index), scale, x
    )
    return out, *pull(g)

  run = jax.jit(jax.vmap(one, (None, None, None, 0)))
  return map(np.asarray, run(scale, x, g, jnp.arange(len(quantizer.bits))))


def assert_matches(arrays, key, found, g, level):
  out, dscale, dx = found
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, err_msg=key)
  assert np.abs(out - arrays[f"{key}.out"]).max() < level / 100  # none flipped
  close(out, arrays[f"{key}.out"], atol=1e-6)
  close(dx, arrays[f"{key}.gin"], atol=1e-6)
  # A float32 sum of terms that cancel.
  close(dscale.sum(), arrays[f"{key}.galpha"], atol=1e-6 * np.abs(g).sum())


def test_weights_and_gradients_match_the_reference(golden):
  arrays = golden("multires_tq.npz")
  for name, alpha, budgets in golden_cases(arrays, "w"):
    assert budgets == [64, 20, 16, 12, 8]
    w, g = (flax_layout(arrays[f"w.{name}.{x}"]) for x in ("in", "gout"))
    quantizer = quant.multi_resolution((8, 7, 6, 5, 4), budgets=budgets)
    scale = np.full((1,) * w.ndim, float(alpha), np.float32)
    outs, dscales, dws = every_budget(quantizer, scale, w, g)
    for i, budget in enumerate(budgets):
      found = torch_layout(outs[i]), dscales[i], torch_layout(dws[i])
      key = f"w.{name}.w5.alpha{alpha}.k{budget}"
      assert_matches(arrays, key, found, g, float(alpha) / 15)


def test_activations_and_gradients_match_the_reference(golden):
  arrays = golden("multires_tq.npz")
  for name, alpha, terms in golden_cases(arrays, "a"):
    assert terms == [6, 3, 2, 1]
    x, g = arrays[f"a.{name}.in"], arrays[f"w.{name}.gout"]
    quantizer = quant.multi_resolution_activation(terms=terms, signed=False)
    scale = np.full(1, float(alpha), np.float32)
    outs, dscales, dxs = every_budget(quantizer, scale, x, g)
    for i, count in enumerate(terms):
      key = f"a.{name}.a5.alpha{alpha}.k{count}"
      found = outs[i], dscales[i], dxs[i]
      assert_matches(arrays, key, found, g, float(alpha) / 31)


def exact(w, scale, g, budget, top):
  """Float64 value and gradients of [c_in, c_out] weights of one group."""
  w, g = w.astype(np.float64), g.astype(np.float64)
  std = w.std(ddof=1)
  z = (w - w.mean()) / std / scale
  m = np.floor(np.minimum(np.abs(z), 1) * top + 0.5).astype(int)
  q = np.zeros_like(z)
  for output in range(w.shape[1]):
    terms = [
      (-abs(term), c, term * np.sign(z[c, output]))
      for c in range(w.shape[0])
      for term in naf_terms(int(m[c, output]))
    ]
    for _, c, term in sorted(terms)[:budget]:
      q[c, output] += term / top
  slope = np.where(np.abs(z) > 1, np.sign(z), q - z)
  return q * scale, g / std, (g * slope).sum()


@pytest.mark.parametrize("magnitude_bits", [1, 3, 4, 8])
@pytest.mark.parametrize("scale", [3.0, 0.7])
def test_values_and_gradients_follow_the_formulas(magnitude_bits, scale):
  rng = np.random.default_rng(magnitude_bits)
  w, g = rng.normal(size=(2, 12, 40)).astype(np.float32)
  w = w * 0.1 + 0.02
  budgets = (40, 12, 5)
  quantizer = quant.multi_resolution(
    (8, 4, 2), budgets=budgets, magnitude_bits=magnitude_bits
  )
  top = 2**magnitude_bits - 1
  start = np.full((1, 1), scale, np.float32)
  outs, dscales, dws = every_budget(quantizer, start, w, g)
  for i, budget in enumerate(budgets):
    expected = exact(w, scale, g, budget, top)
    np.testing.assert_allclose(outs[i], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dws[i], expected[1], rtol=1e-5)
    np.testing.assert_allclose(
      dscales[i], [[expected[2]]], rtol=1e-5, atol=1e-3
    )


def test_the_scale_starts_at_three_standard_deviations():
  w = np.random.default_rng(0).normal(size=(3, 3, 4, 8)).astype(np.float32)
  quantizer = quant.multi_resolution()
  params = quantizer.init(w)
  np.testing.assert_array_equal(params["scale"], np.full((1, 1, 1, 1), 3))
  out = quantizer.fake_quantize(params, 5 * w + 1, 0)
  v = (w - w.mean()) / w.std(ddof=1)
  # Four magnitude bits over three standard deviations, nothing cut.
  assert np.abs(out - np.clip(v, -3, 3)).max() <= 0.1 + 1e-5


def test_stored_are_signs_and_magnitudes_the_same_for_every_budget():
  w = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
  for magnitude_bits in (4, 8):
    quantizer = quant.multi_resolution(magnitude_bits=magnitude_bits)
    top = 2**magnitude_bits - 1
    encoded = quantizer.encode({"scale": jnp.full((1, 1), 1.5)}, w)
    assert quantizer.stored_bits == magnitude_bits + 1
    assert int(encoded["codes"].min()) == -top
    assert int(encoded["codes"].max()) == top
    sizes = {quantizer.storage.size(encoded, i) for i in range(4)}
    assert sizes == {128 * (magnitude_bits + 1) // 8 + 4}


def test_default_budgets_and_terms():
  weight = dict(quant.multi_resolution().options)
  assert weight["budgets"] == (32, 24, 16, 8)
  assert weight["group"] == 16
  activation = dict(quant.multi_resolution_activation().options)
  assert activation["terms"] == (3, 3, 3, 2)


@pytest.mark.parametrize("signed", [True, False])
def test_activations_follow_the_formulas(signed):
  scale = 2.0
  x = np.concatenate([np.linspace(-3, 3, 997), [-2, 0, 2]]).astype(np.float32)
  g = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
  quantizer = quant.multi_resolution_activation(
    (8, 4, 2), terms=(3, 2, 1), signed=signed
  )
  z = x.astype(np.float64) / scale
  low = -1 if signed else 0
  m = np.floor(np.abs(np.clip(z, low, 1)) * 31 + 0.5).astype(int)
  inside = (z >= low) & (z <= 1)
  for index, terms in enumerate((3, 2, 1)):
    q = np.sign(z) * [sum(naf_terms(int(value))[:terms]) for value in m] / 31
    slope = np.where(inside, q - z, np.clip(z, low, 1))
    out, pull = jax.vjp(
      lambda s, x, i=index: quantizer.fake_quantize({"scale": s}, x, i),
      jnp.full((1,), scale),
      x,
    )
    dscale, dx = pull(g)
    np.testing.assert_allclose(out, q * scale, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))
    np.testing.assert_allclose(dscale[0], (g * slope).sum(), rtol=1e-4)


def test_an_activation_equal_to_the_scale_is_not_clipped():
  quantizer = quant.multi_resolution_activation((8,), signed=True)
  for scale in np.linspace(0.5, 8, 7, dtype=np.float32):
    x = scale * np.array([-1, 1], np.float32)
    x = np.concatenate([x, x * np.float32(1 + 2.0**-20)])
    _, _, dx = every_budget(quantizer, scale[None], x, np.ones_like(x))
    np.testing.assert_array_equal(dx, [[1, 1, 0, 0]])


def test_the_activation_scale_starts_at_31_of_the_first_steps_of_lsq():
  x = np.random.default_rng(0).normal(size=(16, 9)).astype(np.float32)
  for signed in (True, False):
    quantizer = quant.multi_resolution_activation(signed=signed)
    expected = 31 * 2 * np.abs(x).mean() / np.sqrt(31)
    np.testing.assert_allclose(
      quantizer.init(x)["scale"], [expected], rtol=1e-5
    )


@pytest.mark.parametrize("raw", [-3.0, 0.0, -0.0, 1e-38, 1e38])
def test_any_finite_activation_scale_is_read_as_a_positive_one(raw):
  quantizer = quant.multi_resolution_activation((4,), signed=True)
  x = jnp.array([-1, 0, 2e-9, 3])
  clamped = np.clip(raw, quant.SCALE_MIN, quant.SCALE_MAX)

  def both(scale):
    return jax.value_and_grad(
      lambda s, x: quantizer.fake_quantize({"scale": s}, x, 0).sum(), (0, 1)
    )(jnp.full((1,), scale, jnp.float32), x)

  jax.tree.map(np.testing.assert_array_equal, both(raw), both(clamped))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(both(raw)))


@pytest.mark.parametrize(
  "name, options, message",
  [
    (
      "multi_resolution",
      {"budgets": (20, 8)},
      r"budgets .*4 integer.*\(20, 8\)",
    ),
    ("multi_resolution", {"group": 40}, r"group .*1\.\.32, got 40"),
    (
      "multi_resolution",
      {"magnitude_bits": 9},
      r"magnitude_bits .*1\.\.8, got 9",
    ),
    (
      "multi_resolution",
      {"bits": (1,)},
      r"bits of multi_resolution .*\(1,\)",
    ),
    (
      "multi_resolution_activation",
      {"terms": (3,)},
      r"terms .*4 integer.*\(3,\)",
    ),
    ("multi_resolution_activation", {"terms": (1, 2, 3, 4)}, "never ascending"),
    ("multi_resolution_activation", {"bits": ()}, r"multi_resolution_activat"),
  ],
)
def test_wrong_options_are_named(name, options, message):
  with pytest.raises(ValueError, match=message):
    quant.get(name, **options)


def test_activation_quantizer_without_a_sign_raises():
  quantizer = quant.multi_resolution_activation((8, 4), terms=(2, 1))
  assert quantizer.signed is None
  with pytest.raises(
    ValueError, match="signed must be True or False, got None"
  ):
    quantizer.init(jnp.ones(3))
  with pytest.raises(ValueError, match="signed must be .* got None.*with_sign"):
    quantizer.fake_quantize({"scale": jnp.ones(1)}, jnp.ones(3), 0)
  for sign in (True, False):
    decided = quantizer.with_sign(sign)
    assert decided.signed is sign
    expected = {**dict(quantizer.options), "signed": sign}
    assert dict(decided.options) == expected
