"""Which bit-widths a step visits."""

import collections

import jax
import numpy as np
import pytest

from dr_jax.train import sampling

BITS = (8, 6, 4, 2)


def draws(name, *, candidates=4, layers=3, number=200, step=0):
  draw = sampling.get(name).draw
  keys = jax.random.split(jax.random.key(0), number)
  return [draw(key, candidates, layers, step) for key in keys]


def test_all_takes_every_bit_width_from_high_to_low_as_constants():
  assert draws("all", number=1) == [[0, 1, 2, 3]]
  assert sampling.get("all").labels(BITS) == BITS


def test_a_sandwich_is_the_highest_one_between_and_the_lowest():
  middles = set()
  for first, middle, last in draws("sandwich"):
    assert (first, last) == (0, 3)
    middles.add(int(middle))
  assert middles == {1, 2}
  assert sampling.get("sandwich").labels(BITS) == (8, "random", 2)


def test_a_pair_is_the_highest_and_any_lower_one():
  lower = set()
  for first, second in draws("pair"):
    assert first == 0
    lower.add(int(second))
  assert lower == {1, 2, 3}
  assert sampling.get("pair").labels(BITS) == (8, "random")


def test_random_draws_every_bit_width_equally_often():
  counts = collections.Counter(
    int(index) for (index,) in draws("random", number=2000)
  )
  # Binomial: 500 expected, standard deviation 19.4; five of them.
  assert set(counts) == {0, 1, 2, 3}
  assert all(abs(count - 500) < 97 for count in counts.values())


def test_mixed_draws_bits_for_every_layer_independently():
  rows = np.array([index for (index,) in draws("mixed", number=2000)])
  assert rows.shape == (2000, 3)
  for layer in range(3):
    counts = np.bincount(rows[:, layer], minlength=4)
    assert (abs(counts - 500) < 97).all()
  same = (rows[:, 0] == rows[:, 1]).mean()
  assert abs(same - 0.25) < 0.05  # five standard deviations of 0.0097


@pytest.mark.parametrize("name", sampling.SAMPLINGS)
@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_few_candidates_stay_within_range(name, candidates):
  labels = sampling.get(name).labels(BITS[:candidates])
  for indices in draws(name, candidates=candidates, number=20):
    assert len(indices) == len(labels)
    assert all((np.asarray(i) < candidates).all() for i in indices)
    assert all((np.asarray(i) >= 0).all() for i in indices)


@pytest.mark.parametrize("name", sampling.SAMPLINGS)
def test_draws_depend_on_the_key_and_not_on_the_step(name):
  early, late = draws(name, number=5), draws(name, number=5, step=1000)
  jax.tree.map(np.testing.assert_array_equal, early, late)


def test_a_sampling_stands_for_itself():
  mixed = sampling.SAMPLINGS["mixed"]
  assert sampling.get(mixed) is mixed


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
  with pytest.raises(
    ValueError, match="sampling must be one of all,.*got 'roulette'"
  ):
    sampling.get("roulette")
