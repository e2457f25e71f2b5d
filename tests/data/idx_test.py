"""The files of MNIST and its likes, written by hand."""

import gzip
import pathlib
import struct

import numpy as np
import pytest

from dr_jax import data

IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([2, 0, 1], np.uint8)


def content(array):
  head = bytes((0, 0, 8, array.ndim)) + struct.pack(
    f">{array.ndim}i", *array.shape
  )
  return head + array.tobytes()


def write(path, images=IMAGES, labels=LABELS):
  for split in ("train", "t10k"):
    for array, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
      name, packed = f"{split}-{kind}-ubyte", content(array)
      if split == "t10k":
        name, packed = f"{name}.gz", gzip.compress(packed)
      (path / name).write_bytes(packed)


def load(path):
  return data.load("idx", path=str(path), test_split="t10k")


def test_images_and_labels_are_those_of_the_files_plain_or_packed(tmp_path):
  write(tmp_path)
  loaded = load(tmp_path)
  assert (loaded.num_classes, loaded.shape) == (3, (4, 5, 1))
  for source in (loaded.train, loaded.test):
    batch = source.gather(np.array([2, 0]))
    expected = IMAGES[[2, 0], ..., None] / np.float32(255)
    np.testing.assert_array_equal(batch["image"], expected)
    assert batch["label"].tolist() == [1, 2]


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("train-images-idx3-ubyte", None, "must hold train-images-idx3-ubyte or"),
    (
      "train-images-idx3-ubyte",
      lambda c: c[:-1],
      r"\(3, 4, 5\) values, got 59",
    ),
    ("train-labels-idx1-ubyte", lambda c: c[:3], "idx file of 1 dimensions"),
    ("train-labels-idx1-ubyte", lambda c: b"x" + c[1:], "idx file of 1 dimens"),
    ("t10k-labels-idx1-ubyte.gz", lambda c: c[:-9], "cannot be read"),
    ("t10k-labels-idx1-ubyte.gz", lambda c: b"x" + c, "cannot be read"),
  ],
)
def test_a_missing_or_damaged_file_is_an_error_that_names_it(
  tmp_path, name, change, message
):
  write(tmp_path)
  file = tmp_path / name
  if change is None:
    file.unlink()
  else:
    file.write_bytes(change(file.read_bytes()))
  with pytest.raises(ValueError, match=message):
    load(tmp_path)


def test_fewer_labels_than_images_are_an_error(tmp_path):
  write(tmp_path, labels=LABELS[:2])
  with pytest.raises(
    ValueError, match="as many labels as images.* got 2 and 3"
  ):
    load(tmp_path)


def test_fashion_mnist_is_read_as_it_was_published():
  path = pathlib.Path(__file__).parents[3] / "shared" / "data" / "fashion-mnist"
  if not path.is_dir():
    pytest.skip("no ../shared/data/fashion-mnist")
  loaded = load(path)
  assert (loaded.num_classes, loaded.shape) == (10, (28, 28, 1))
  assert (len(loaded.train), len(loaded.test)) == (60_000, 10_000)
  assert np.bincount(loaded.test.labels).tolist() == [1000] * 10
  # Boots, the first image of the training set.
  assert loaded.train.labels[0] == 9
  assert round(float(loaded.train.images.mean()), 4) == 0.2860
