import subprocess
import sys

import numpy as np
import pytest

from dr_jax import data


@pytest.fixture(scope="module")
def digits():
  return data.load("digits")


def test_digits_are_8x8_gray_images_between_0_and_1(digits):
  assert (digits.num_classes, digits.shape) == (10, (8, 8, 1))
  for source in (digits.train, digits.test):
    example = source[0]
    assert example["image"].shape == digits.shape
    assert example["image"].dtype == np.float32
    assert example["label"].dtype == np.int32
    batch = source.gather(np.arange(len(source)))
    assert (batch["image"].min(), batch["image"].max()) == (0, 1)
    assert set(batch["label"].tolist()) == set(range(10))


def test_digits_are_split_70_to_30_with_every_class_in_proportion(digits):
  train, test = digits.train.labels, digits.test.labels
  assert (len(train), len(test)) == (1257, 540)
  share = np.bincount(test) / np.bincount(np.concatenate([train, test]))
  # A class has about 180 digits, so rounding moves its share by under 1/180.
  np.testing.assert_allclose(share, 0.3, atol=1 / 170)


def test_train_and_test_together_are_scikit_learns_digits(digits):
  from sklearn.datasets import load_digits

  got = np.concatenate([digits.train.images, digits.test.images])
  got = np.sort((got * 16).reshape(-1, 64).view("f4," * 63 + "f4"), axis=0)
  want = load_digits().data.astype(np.float32)
  want = np.sort(want.view("f4," * 63 + "f4"), axis=0)
  np.testing.assert_array_equal(got, want)


def test_the_split_depends_on_its_seed_only(digits):
  again, other = data.load("digits"), data.load("digits", seed=1)
  np.testing.assert_array_equal(again.train.images, digits.train.images)
  assert not np.array_equal(other.train.images, digits.train.images)


def test_an_example_equals_its_row_of_a_gathered_batch(digits):
  batch = digits.train.gather(np.array([5, 2]))
  for row, index in enumerate([5, 2]):
    example = digits.train[index]
    np.testing.assert_array_equal(example["image"], batch["image"][row])
    assert example["label"] == batch["label"][row]


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
  with pytest.raises(
    ValueError, match="name must be one of digits,.*got 'digit'"
  ):
    data.load("digit")


def test_scikit_learn_is_imported_only_with_the_digits():
  code = "import sys, dr_jax.data; sys.exit('sklearn' in sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)


def _numbered(n=10):
  images = np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1)
  return data.ArraySource(images, np.arange(n, dtype=np.int32))


class _OneByOne(data.Source):
  """A source that defines only its length and index."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    return self._source[index]


@pytest.mark.parametrize("wrap", [lambda source: source, _OneByOne])
def test_hold_out_splits_every_example_to_one_side(wrap):
  kept, held_out = data.hold_out(wrap(_numbered()), 0.3)
  assert (len(kept), len(held_out)) == (7, 3)
  sides = [[int(side[i]["label"]) for i in range(len(side))] for side in
           (kept, held_out)]  # fmt: skip
  assert sorted(sides[0] + sides[1]) == list(range(10))
  assert sides[0] + sides[1] != list(range(10))
  batch = next(data.epoch(held_out, batch_size=3))
  assert batch["label"].tolist() == sides[1]
  assert batch["image"].ravel().tolist() == sides[1]


def test_hold_out_depends_on_its_seed_alone():
  draws = [
    data.hold_out(_numbered(), 0.5, seed=seed)[0].indices.tolist()
    for seed in (0, 0, 1)
  ]
  assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("holdout", [0, 1, -0.5, 1.5, 0.01, 0.99, float("nan")])
def test_hold_out_leaves_examples_on_both_sides(holdout):
  with pytest.raises(
    ValueError, match="holdout must be > 0 and < 1 and leave examples on"
  ):
    data.hold_out(_numbered(), holdout)
