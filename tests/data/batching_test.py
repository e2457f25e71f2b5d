import numpy as np
import pytest

from dr_jax import data


def numbered(size):
  """Returns a source whose image i is filled with i, with label i."""
  images = np.arange(size, dtype=np.float32)[:, None, None, None]
  images = np.broadcast_to(images, (size, 2, 2, 1))
  return data.ArraySource(images, np.arange(size, dtype=np.int32))


class OneByOne(data.Source):
  """A source that hands out single examples only, as image files do."""

  def __init__(self, size):
    self._source = numbered(size)

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    return self._source[index]


def stream(batches, steps):
  return np.concatenate([batches[step]["label"] for step in range(steps)])


def test_a_batch_has_float_images_and_integer_labels_that_belong_together():
  batch = data.batches(numbered(10), batch_size=4, seed=0)[0]
  assert batch["image"].shape == (4, 2, 2, 1)
  assert batch["image"].dtype == np.float32
  assert batch["label"].dtype == np.int32
  np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (7, 7)])
def test_every_example_occurs_once_per_epoch(size, batch_size):
  epochs = 6
  batches = data.batches(numbered(size), batch_size=batch_size, seed=0)
  labels = stream(batches, -(-epochs * size // batch_size))[: epochs * size]
  for labels_of_epoch in labels.reshape(epochs, size):
    assert sorted(labels_of_epoch) == list(range(size))


def test_every_epoch_and_every_seed_has_its_own_order():
  orders = {
    tuple(labels)
    for seed in range(3)
    for labels in stream(
      data.batches(numbered(20), batch_size=20, seed=seed), 3
    ).reshape(3, 20)
  }
  assert len(orders) == 9


def test_an_epoch_order_puts_every_example_at_every_position_about_equally():
  size, epochs = 8, 4000
  batches = data.batches(numbered(size), batch_size=size, seed=3)
  labels = stream(batches, epochs).reshape(epochs, size)
  count = np.stack([(labels == label).sum(axis=0) for label in range(size)])
  # Binomial with p = 1/8: standard deviation 21, so 105 is five of them.
  assert np.abs(count - epochs / size).max() < 105


def test_a_step_gives_the_same_batch_whatever_was_read_before():
  batches = data.batches(numbered(50), batch_size=8, seed=1)
  forward = [batches[step]["label"] for step in range(20)]
  fresh = data.batches(numbered(50), batch_size=8, seed=1)
  for step in reversed(range(20)):
    np.testing.assert_array_equal(fresh[step]["label"], forward[step])


def test_the_order_is_the_one_that_was_published():
  # A change here makes resumed runs differ from uninterrupted ones.
  batches = data.batches(numbered(8), batch_size=8, seed=0)
  assert batches[0]["label"].tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
  assert batches[1]["label"].tolist() == [3, 7, 4, 2, 1, 6, 5, 0]


def test_the_shards_of_all_processes_make_up_the_batch_of_one():
  whole = data.batches(numbered(30), batch_size=8, seed=2)
  shares = [
    data.batches(
      numbered(30), batch_size=8, seed=2, process_index=p, process_count=4
    )
    for p in range(4)
  ]
  for step in range(12):
    labels = np.concatenate([share[step]["label"] for share in shares])
    np.testing.assert_array_equal(labels, whole[step]["label"])


def test_a_source_that_defines_only_length_and_index_gives_the_same_batches():
  for step in range(5):
    want = data.batches(numbered(9), batch_size=4, seed=0)[step]
    got = data.batches(OneByOne(9), batch_size=4, seed=0)[step]
    assert got["image"].dtype == np.float32
    assert got["label"].dtype == np.int32
    np.testing.assert_array_equal(got["image"], want["image"])
    np.testing.assert_array_equal(got["label"], want["label"])


@pytest.mark.parametrize("batch_size", [3, 4, 10, 16])
def test_an_evaluation_pass_is_in_order_and_masks_its_filling(batch_size):
  batches = list(data.epoch(numbered(10), batch_size=batch_size))
  assert len(batches) == -(-10 // batch_size)
  for batch in batches:
    assert batch["image"].shape == (batch_size, 2, 2, 1)
    assert batch["mask"].shape == (batch_size,)
    assert batch["mask"].dtype == np.float32
  labels = np.concatenate([batch["label"] for batch in batches])
  mask = np.concatenate([batch["mask"] for batch in batches])
  np.testing.assert_array_equal(labels[mask == 1], np.arange(10))
  assert mask.sum() == 10


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_a_batch_size_out_of_range_is_an_error_that_says_the_range(batch_size):
  message = rf"^batch_size must be in 1\.\.10, .*, got {batch_size}$"
  with pytest.raises(ValueError, match=message):
    data.batches(numbered(10), batch_size=batch_size, seed=0)


def test_an_evaluation_batch_size_below_1_is_an_error_before_the_first_batch():
  with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
    data.epoch(numbered(10), batch_size=0)


def test_a_batch_that_processes_do_not_divide_is_an_error():
  with pytest.raises(ValueError, match="batch_size must be divisible.*got 6"):
    data.batches(numbered(10), batch_size=6, seed=0, process_count=4)


def test_a_negative_seed_is_an_error():
  with pytest.raises(ValueError, match=r"^seed must be >= 0, got -1$"):
    data.batches(numbered(10), batch_size=2, seed=-1)


@pytest.fixture(scope="module")
def crops():
  """Synthetic images, cropped at random."""
  return data.load(
    "synthetic", examples=20, image_size=16, augment="random_resized_crop"
  ).train


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("size", [10, 16, 17])
def test_processes_evaluate_every_example_once(process_count, size):
  passes = [
    list(
      data.epoch(
        numbered(size),
        batch_size=8,
        process_index=process,
        process_count=process_count,
      )
    )
    for process in range(process_count)
  ]
  assert {len(batches) for batches in passes} == {-(-size // 8)}
  labels = []
  for batches in passes:
    for batch in batches:
      assert batch["image"].shape == (8 // process_count, 2, 2, 1)
      assert batch["mask"].shape == (8 // process_count,)
      labels += batch["label"][batch["mask"] == 1].tolist()
  assert sorted(labels) == list(range(size))


def test_an_evaluation_batch_that_processes_do_not_divide_raises_an_error():
  with pytest.raises(ValueError, match="batch_size must be divisible.*got 6"):
    data.epoch(numbered(10), batch_size=6, process_count=4)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_train_on_every_example_once_per_epoch(process_count):
  shares = [
    data.batches(
      numbered(24),
      batch_size=8,
      seed=5,
      process_index=process,
      process_count=process_count,
    )
    for process in range(process_count)
  ]
  for epoch in range(2):
    steps = range(3 * epoch, 3 * epoch + 3)
    labels = [share[step]["label"] for share in shares for step in steps]
    assert sorted(np.concatenate(labels)) == list(range(24))


@pytest.mark.parametrize("process_count", [2, 4])
def test_augmentation_does_not_depend_on_the_number_of_processes(
  crops, process_count
):
  whole = data.batches(crops, batch_size=8, seed=2)
  shares = [
    data.batches(
      crops,
      batch_size=8,
      seed=2,
      process_index=process,
      process_count=process_count,
    )
    for process in range(process_count)
  ]
  for step in range(6):
    images = np.concatenate([share[step]["image"] for share in shares])
    np.testing.assert_array_equal(images, whole[step]["image"])


def test_an_example_looks_different_in_every_epoch_and_for_every_seed(crops):
  seen = {
    (label, image.tobytes())
    for seed in range(2)
    for step in range(3)
    for label, image in zip(
      *(data.batches(crops, batch_size=20, seed=seed)[step][k]
        for k in ("label", "image")),
      strict=True,
    )
  }  # fmt: skip
  assert len(seen) == 2 * 3 * 20


def test_an_evaluation_is_not_augmented(crops):
  first, again = (next(data.epoch(crops, batch_size=20)) for _ in range(2))
  np.testing.assert_array_equal(first["image"], again["image"])
  for index in range(20):
    np.testing.assert_array_equal(first["image"][index], crops[index]["image"])


def test_a_stream_begins_in_the_middle_of_an_epoch(crops):
  batches = data.batches(crops, batch_size=8, seed=1)
  stream = batches.stream(4)
  for step in range(4, 9):
    batch = next(stream)
    assert set(batch) == {"image", "label"}
    np.testing.assert_array_equal(batch["image"], batches[step]["image"])
    np.testing.assert_array_equal(batch["label"], batches[step]["label"])
  stream.close()
  with pytest.raises(StopIteration):
    next(stream)
