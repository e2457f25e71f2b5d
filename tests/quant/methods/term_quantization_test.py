"""Term quantization against formulas in numpy and the reference kernel."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant


def hese_terms(m):
  terms, exponent = [], 0
  while m >> exponent:
    start = exponent
    while m >> exponent & 1:
      exponent += 1
    if (ones := exponent - start) == 1:
      terms.append(1 << start)
    elif ones:
      terms += [-(1 << start), 1 << exponent]
    exponent += 1
  return terms[::-1]


def flax_layout(x):
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def golden_weights(arrays):
  """The budgets of every (name, weight bits, group), highest first."""
  budgets = {}
  for key in arrays:
    found = re.fullmatch(r"w\.(\w+)\.wb(\d)\.g(\d+)\.k(\d+)\.out", key)
    if found:
      case = (found[1], int(found[2]), int(found[3]))
      budgets.setdefault(case, []).append(int(found[4]))
  return {case: sorted(ks, reverse=True) for case, ks in budgets.items()}


@pytest.mark.slow
def test_weights_match_the_reference_kernel(golden):
  arrays = golden("term_quantization.npz")
  cases = golden_weights(arrays)
  outputs = [key for key in arrays if key[0] == "w" and key.endswith(".out")]
  assert sum(map(len, cases.values())) == len(outputs) > 90
  for (name, weight_bits, group), budgets in cases.items():
    key = f"w.{name}.wb{weight_bits}"
    w = flax_layout(arrays[f"w.{name}.in"])
    quantizer = quant.term_quantization(
      range(8, 8 - len(budgets), -1),
      budgets=budgets,
      group=group,
      weight_bits=weight_bits,
    )
    outs, encoded = jax.jit(
      lambda w, indices, q=quantizer: (
        jax.vmap(q.fake_quantize, (None, None, 0))({}, w, indices),
        q.encode({}, w),
      )
    )(w, jnp.arange(len(budgets)))
    scale = arrays[f"{key}.sf"]
    for budget, out in zip(budgets, np.asarray(outs), strict=True):
      expected = flax_layout(arrays[f"{key}.g{group}.k{budget}.out"])
      np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
      assert np.abs(out - expected).max() < scale / 100  # no flipped level
    assert encoded["scale"].shape == (1,) * w.ndim
    np.testing.assert_allclose(encoded["scale"].reshape(()), scale, rtol=1e-6)


def golden_activations(arrays):
  for key in arrays:
    found = re.fullmatch(r"a\.b(\d)\.t(\d)\.out", key)
    if found:
      yield key, *map(int, found.groups())


def test_activations_match_the_reference_at_its_own_scales(golden):
  arrays = golden("term_quantization.npz")
  cases = list(golden_activations(arrays))
  assert len(cases) == 4
  for key, data_bits, terms in cases:
    quantizer = quant.term_activation(
      (8,), data_bits=data_bits, terms=(terms,), signed=True
    )
    scale = arrays[key.replace("out", "sf")].astype(np.float32)
    found = quantizer.fake_quantize({"scale": scale[None]}, arrays["a.in"], 0)
    np.testing.assert_allclose(found, arrays[key], rtol=1e-5, atol=1e-6)
    assert np.abs(found - arrays[key]).max() < scale / 100


@pytest.mark.parametrize("signed", [True, False])
def test_calibration_finds_the_scales_of_the_reference(golden, signed):
  arrays = golden("term_quantization.npz")
  for key, data_bits, terms in golden_activations(arrays):
    quantizer = quant.term_activation(
      (8,), data_bits=data_bits, terms=(terms,), signed=signed
    )
    params = jax.jit(quantizer.init)(arrays["a.calib.in"])
    np.testing.assert_allclose(
      params["scale"][0], arrays[key.replace("out", "sf")], rtol=1e-6
    )


def test_three_weights_of_a_group_by_hand():
  # s = 128 / 128 = 1: codes 128, 27 = 32 - 8 + 4 - 1, -3 = -4 + 1.
  w = np.array([[128.0], [27.4], [-2.5]], np.float32)
  quantizer = quant.term_quantization((8, 4, 3, 2), budgets=(7, 4, 3, 1))
  encoded = quantizer.encode({}, w)
  np.testing.assert_array_equal(encoded["codes"][:, 0], [128, 27, -3])
  np.testing.assert_array_equal(encoded["scale"], [[1.0]])
  for index, expected in enumerate(
    ([128, 27, -3], [128, 28, 0], [128, 24, 0], [128, 0, 0])
  ):
    # The term 4 of the second channel comes before -4 of the third.
    out = quantizer.fake_quantize({}, w, index)
    np.testing.assert_array_equal(out[:, 0], expected)


def test_groups_run_along_input_channels_of_one_output_channel():
  rng = np.random.default_rng(0)
  w = rng.normal(size=(2, 1, 6, 3)).astype(np.float32)
  w[0, 0, 0, 0] = 4  # the largest of all, in every slice's scale
  quantizer = quant.term_quantization((4,), budgets=(5,), group=4)
  fake = jax.jit(lambda w: quantizer.fake_quantize({}, w, 0))
  whole = fake(w)
  for place in itertools.product(range(2), range(0, 6, 4), range(3)):
    window, start, output = place
    w_alone = np.zeros_like(w)
    w_alone[0, 0, 0, 0] = 4
    taken = (window, 0, slice(start, start + 4), output)
    w_alone[taken] = w[taken]
    np.testing.assert_array_equal(fake(w_alone)[taken], whole[taken])


@pytest.mark.parametrize("weight_bits", range(1, 10))
def test_untruncated_codes_round_halves_away_from_zero(weight_bits):
  top = 2 ** (weight_bits - 1)
  codes = np.arange(-4 * top, 4 * top + 1) / 4
  quantizer = quant.term_quantization(
    (8,), budgets=(99,), group=1, weight_bits=weight_bits
  )
  w = (codes * 0.125).astype(np.float32)[:, None]
  expected = np.sign(codes) * np.floor(np.abs(codes) + 0.5)
  encoded, out = jax.jit(
    lambda w: (quantizer.encode({}, w), quantizer.fake_quantize({}, w, 0))
  )(w)
  np.testing.assert_array_equal(encoded["codes"][:, 0], expected)
  assert encoded["codes"].dtype == (jnp.int16 if weight_bits > 7 else jnp.int8)
  np.testing.assert_array_equal(encoded["scale"], [[0.125]])
  np.testing.assert_array_equal(out[:, 0], expected * 0.125)


@pytest.mark.parametrize("index", [0, 1])
def test_the_gradient_of_a_weight_passes_unchanged(index):
  rng = np.random.default_rng(0)
  w, g = rng.normal(size=(2, 16, 5)).astype(np.float32)
  quantizer = quant.term_quantization((8, 2), budgets=(12, 1))
  fake = jax.jit(lambda w, i: quantizer.fake_quantize({}, w, i))
  out, pull = jax.vjp(lambda w: fake(w, jnp.int32(index)), w)
  assert (np.abs(out - w).max() > 0.5) == index  # cut, and still passing
  np.testing.assert_array_equal(pull(g)[0], g)


def test_lower_budget_keeps_a_subset_of_the_terms_of_a_higher_one():
  w = np.random.default_rng(0).normal(size=(3, 3, 16, 4)).astype(np.float32)
  quantizer = quant.term_quantization(
    (8, 7, 6, 5, 4, 3, 2), budgets=(40, 20, 15, 10, 6, 3, 1)
  )
  fake = jax.jit(jax.vmap(quantizer.fake_quantize, (None, None, 0)))
  encoded = quantizer.encode({}, w)
  outs = np.rint(fake({}, w, jnp.arange(7)) / encoded["scale"][None])
  codes = np.asarray(encoded["codes"]).reshape(-1).tolist()
  counts = []
  for code, *values in zip(codes, *outs.reshape(7, -1), strict=True):
    sums = np.cumsum([0, *hese_terms(abs(code))]).tolist()
    counts.append([sums.index(abs(int(value))) for value in values])
  assert (np.diff(counts) <= 0).all()
  totals = np.sum(counts, 0)
  assert (np.diff(totals) < 0).all()
  assert totals[-1] == 3 * 3 * 2 * 4  # one term in each group of eight


def test_default_budgets_count_four_bits_a_term():
  def options(*args, **kwargs):
    return dict(quant.term_quantization(*args, **kwargs).options)

  assert options()["budgets"] == (16, 12, 8, 4)
  assert options((7, 3), group=16)["budgets"] == (28, 12)
  assert options((5, 2), group=5)["budgets"] == (6, 2)


def test_default_terms_are_half_the_bits_rounded_up():
  quantizer = quant.term_activation((8, 7, 5, 4, 3, 2))
  assert dict(quantizer.options)["terms"] == (4, 4, 3, 2, 2, 1)


def test_storing_one_budget_takes_as_much_as_storing_all():
  w = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
  quantizer = quant.term_quantization((8, 4, 2))
  encoded = quantizer.encode({}, w)
  assert quantizer.stored_bits == 9
  packed = sum(a.nbytes for a in quantizer.storage.pack(encoded).values())
  assert packed == 80 * 9 // 8 + 4
  assert [quantizer.storage.size(encoded, i) for i in range(3)] == [packed] * 3


@pytest.mark.parametrize(
  "options, message",
  [
    ({"budgets": (8, 4)}, r"budgets .*4 integers.*descending.*\(8, 4\)"),
    ({"budgets": (8, 4, 4, 2)}, r"budgets .*descending.*\(8, 4, 4, 2\)"),
    ({"budgets": (8, 4, 2, 0)}, r"budgets .*in 1\.\.65536.*\(8, 4, 2, 0\)"),
    ({"budgets": (8, 4, 2, 1.5)}, r"budgets .*integers.*\(8, 4, 2, 1.5\)"),
    ({"budgets": 8, "bits": (4,)}, r"budgets .*1 integers.*got 8"),
    ({"group": 1}, r"descending.*got None \(which is \(2, 1, 1, 1\)\)"),
    ({"group": 0}, r"group must be an integer in 1\.\.32, got 0"),
    ({"group": 33}, r"group must be an integer in 1\.\.32, got 33"),
    ({"group": 2.0}, r"group must be an integer in 1\.\.32, got 2\.0"),
    ({"weight_bits": 10}, r"weight_bits .*integer in 1\.\.9, got 10"),
    ({"bits": (4, 4)}, r"bits of term_quantization .*\(4, 4\)"),
  ],
)
def test_wrong_options_of_weights_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    quant.term_quantization(**options)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"terms": (3, 2)}, r"terms .*4 integers.*ascending.*\(3, 2\)"),
    ({"terms": (3, 2, 1, 2)}, r"terms .*ascending.*\(3, 2, 1, 2\)"),
    ({"terms": (3, 2, 1, 0)}, r"terms .*in 1\.\.65536.*\(3, 2, 1, 0\)"),
    ({"terms": "3221"}, r"terms .*integers.*'3221'"),
    ({"data_bits": 0}, r"data_bits .*integer in 1\.\.9, got 0"),
    ({"bits": (2, 4)}, r"bits of term_activation .*\(2, 4\)"),
  ],
)
def test_wrong_options_of_activations_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    quant.term_activation(**options)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("data_bits", [3, 8])
def test_activations_keep_the_largest_terms_of_every_code(data_bits, signed):
  top, scale = 2**data_bits - 1, np.float32(0.25)
  codes = np.arange(-4 * top - 8, 4 * top + 9) / 4
  m = np.minimum(np.floor(np.abs(codes) + 0.5), top).astype(int)
  sign = np.sign(codes) if signed else codes > 0
  x = (codes * scale).astype(np.float32)
  quantizer = quant.term_activation(
    (8, 6, 4, 2), data_bits=data_bits, signed=signed
  )
  params = {"scale": np.full(4, scale)}
  for index, terms in enumerate((4, 3, 2, 1)):  # half the bits
    kept = np.array([sum(hese_terms(int(value))[:terms]) for value in m])
    found = quantizer.fake_quantize(params, x, index)
    np.testing.assert_array_equal(found, sign * kept * scale)


@pytest.mark.parametrize("signed", [True, False])
def test_activation_gradients_pass_where_nothing_is_clipped(signed):
  quantizer = quant.term_activation((2,), data_bits=2, signed=signed)
  x = jnp.array([-2.0, -1.5, -0.1, 0.0, 0.7, 1.5, 1.6])
  _, pull = jax.vjp(
    lambda p, x: quantizer.fake_quantize(p, x, 0),
    {"scale": jnp.array([0.5])},
    x,
  )
  dparams, dx = pull(jnp.ones(7))
  negative = [0, 1, 1] if signed else [0, 0, 0]
  np.testing.assert_array_equal(dx, [*negative, 1, 1, 1, 0])
  np.testing.assert_array_equal(dparams["scale"], [0])


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**-4, 2.0**4, 2.0**20])
def test_calibration_follows_the_size_of_its_inputs(factor):
  """Found scales are those of inputs within the published range, scaled."""
  x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
  x = np.clip(np.abs(x), 0, 4.5)
  at_hand = x * 8 if factor > 1 else x  # fills the range, or a tenth of it
  quantizer = quant.term_activation(signed=False)
  init = jax.jit(quantizer.init)
  np.testing.assert_array_equal(
    init(at_hand * np.float32(factor))["scale"],
    init(at_hand)["scale"] * np.float32(factor),
  )


def test_calibrated_scales_have_the_smallest_squared_error():
  x = np.random.default_rng(0).normal(size=(500,)).astype(np.float32) * 4
  quantizer = quant.term_activation((8, 4, 2), signed=True)

  def error(scale, index):
    params = {"scale": jnp.full((3,), scale)}
    return ((quantizer.fake_quantize(params, x, index) - x) ** 2).sum()

  errors_of = jax.jit(jax.vmap(error, (0, None)))
  candidates = np.arange(1, 200, dtype=np.float32) * np.float32(50 / 2047)
  for index, scale in enumerate(quantizer.init(x)["scale"]):
    best = errors_of(candidates, index).min()
    # The histogram knows inputs to 1/82 only.
    assert error(scale, index) <= 1.05 * best


@pytest.mark.parametrize("raw", [-3.0, 0.0, 1e-38, 1e38])
def test_any_finite_scale_of_an_activation_is_read_as_a_positive_one(raw):
  quantizer = quant.term_activation((4,), signed=True)
  x = np.float32([-1, 0, 2e-8, 3])
  clamped = np.clip(raw, quant.SCALE_MIN, quant.SCALE_MAX)
  found, expected = (
    quantizer.fake_quantize({"scale": jnp.full((1,), s, jnp.float32)}, x, 0)
    for s in (raw, clamped)
  )
  np.testing.assert_array_equal(found, expected)
  assert np.isfinite(found).all()


def test_activation_quantizer_without_a_sign_raises():
  quantizer = quant.term_activation((8, 4), data_bits=6, terms=(3, 1))
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
    expected = {**dict(quantizer.options), "signed": sign}
    assert dict(decided.options) == expected
