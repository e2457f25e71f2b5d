"""Signed powers of two against recursive forms and greedy selection."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.quant.core import signed_digits


def terms_of(plus, minus):
  """Terms of two masks, largest first."""
  terms = [1 << e for e in range(31) if plus >> e & 1]
  terms += [-(1 << e) for e in range(31) if minus >> e & 1]
  return sorted(terms, key=abs, reverse=True)


def binary_terms(m):
  return [1 << e for e in range(m.bit_length(), -1, -1) if m >> e & 1]


def hese_terms(m):
  """Runs of ones, read from the top of the digit string."""
  terms, exponent = [], m.bit_length()
  while exponent >= 0:
    end = exponent
    while exponent >= 0 and m >> exponent & 1:
      exponent -= 1
    if (ones := end - exponent) == 1:
      terms.append(1 << end)
    elif ones:
      terms += [1 << (end + 1), -(1 << (exponent + 1))]
    exponent -= 1
  return terms


def naf_terms(m):
  """The textbook recursion: an odd m leaves 2 - (m mod 4)."""
  terms, weight = [], 1
  while m:
    if m % 2:
      digit = 2 - m % 4
      terms.append(digit * weight)
      m -= digit
    m, weight = m // 2, 2 * weight
  return terms[::-1]


TERMS = {"binary": binary_terms, "hese": hese_terms, "naf": naf_terms}


@functools.cache
def encoded(encoding, largest):
  m = jnp.arange(largest + 1, dtype=jnp.int32)
  plus, minus = jax.jit(signed_digits.ENCODINGS[encoding])(m)
  pairs = zip(plus.tolist(), minus.tolist(), strict=True)
  return [terms_of(*pair) for pair in pairs]


@pytest.mark.parametrize("encoding", TERMS)
def test_terms_of_every_integer_follow_the_definition(encoding):
  found = encoded(encoding, 1200)
  assert found == [TERMS[encoding](m) for m in range(1201)]
  assert [sum(terms) for terms in found] == list(range(1201))


def test_terms_of_few_integers_by_hand():
  assert encoded("hese", 1200)[27] == [32, -8, 4, -1]
  assert encoded("naf", 1200)[27] == [32, -4, -1]
  assert encoded("binary", 1200)[27] == [16, 8, 2, 1]
  assert encoded("hese", 1200)[0] == []
  assert encoded("hese", 1200)[5] == [4, 1]
  assert encoded("hese", 1200)[3] == [4, -1]


def rows(table):
  return [[int(term) for term in row if term] for row in table]


def test_hese_terms_match_the_reference_kernel(golden):
  arrays = golden("term_quantization.npz")
  expected = rows(arrays["hese.kernel.terms"])
  assert expected == rows(arrays["hese.tr_layer_py.terms"])
  found = encoded("hese", 1200)
  for m, terms, count in zip(
    arrays["hese.ints"], expected, arrays["hese.kernel.count"], strict=True
  ):
    signed = [int(np.sign(m)) * term for term in found[abs(m)]]
    assert signed == terms
    assert len(signed) == count


@pytest.mark.parametrize(
  "encoding, key", [("binary", "linear"), ("hese", "hese"), ("naf", "optim")]
)
def test_every_encoding_matches_the_trainable_reference(golden, encoding, key):
  arrays = golden("multires_tq.npz")
  found = encoded(encoding, 1200)
  expected = rows(arrays[f"enc.{key}.terms"])
  assert [found[m] for m in arrays["enc.ints"]] == expected


def greedy(codes, budget, encoding, group):
  """Sorts all terms of a group by size, then by channel, and cuts."""
  kept = np.zeros_like(codes)
  *windows, channels, outputs = codes.shape
  for place in np.ndindex(*windows, outputs):
    for start in range(0, channels, group):
      terms = []
      for c in range(start, min(start + group, channels)):
        code = int(codes[(*place[:-1], c, place[-1])])
        for term in TERMS[encoding](abs(code)):
          terms.append((-abs(term), c, term if code > 0 else -term))
      for _, c, term in sorted(terms)[:budget]:
        kept[(*place[:-1], c, place[-1])] += term
  return kept


@pytest.mark.parametrize(
  "shape, group, budget",
  [
    ((2, 3, 8, 5), 4, 6),
    ((2, 1, 7, 3), 3, 2),
    ((1, 2, 3, 4), 8, 5),  # a single group, shorter than the others
    ((40, 6), 16, 20),
    ((70, 3), 32, 40),  # all 32 bits of a plane
    ((9, 4), 1, 1),
    ((16, 8), 8, 1000),  # nothing is cut
  ],
)
def test_a_group_keeps_its_largest_terms_and_lower_channels_first(
  shape, group, budget
):
  rng = np.random.default_rng(group)
  # Small codes too, so that many terms are equal.
  codes = rng.integers(-128, 129, shape) >> rng.integers(0, 7, shape)
  codes = codes.astype(np.int32)

  @jax.jit
  def kept(codes, traced):
    found = {}
    for encoding in TERMS:
      keep = functools.partial(
        signed_digits.keep_largest, encoding=encoding, group=group, largest=128
      )
      found[encoding] = keep(codes, budget), keep(codes, traced)
    return found

  for encoding, found in kept(codes, jnp.int32(budget)).items():
    expected = greedy(codes, budget, encoding, group)
    np.testing.assert_array_equal(found[0], expected, err_msg=encoding)
    np.testing.assert_array_equal(found[1], expected, err_msg=encoding)


def test_equal_terms_of_one_group_by_hand():
  keep = functools.partial(
    signed_digits.keep_largest, encoding="naf", group=4, largest=16
  )
  codes = np.array([[4], [-4], [4], [5], [1], [16]], np.int32)
  for budget, expected in {
    1: [4, 0, 0, 0, 0, 16],
    2: [4, -4, 0, 0, 1, 16],
    3: [4, -4, 4, 0, 1, 16],
    4: [4, -4, 4, 4, 1, 16],
    5: [4, -4, 4, 5, 1, 16],
  }.items():
    np.testing.assert_array_equal(keep(codes, budget)[:, 0], expected)


@pytest.mark.parametrize("encoding", TERMS)
@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_code_without_a_group_keeps_its_largest_terms(encoding, budget):
  codes = np.arange(-255, 256, dtype=np.int32)
  keep = functools.partial(
    signed_digits.keep_largest, encoding=encoding, group=0, largest=255
  )
  expected = [
    int(np.sign(m)) * sum(TERMS[encoding](abs(int(m)))[:budget]) for m in codes
  ]
  found = jax.jit(lambda m, traced: (keep(m, budget), keep(m, traced)))(
    codes, jnp.int32(budget)
  )
  np.testing.assert_array_equal(found[0], expected)
  np.testing.assert_array_equal(found[1], expected)
