import numpy as np
import pytest

from dr_jax import data


def everything(source):
  return source.gather(np.arange(len(source)))


@pytest.mark.parametrize("channels", [1, 3])
def test_synthetic_images_have_the_requested_shapes_and_labels(channels):
  loaded = data.load(
    "synthetic", classes=5, examples=12, image_size=18, channels=channels
  )
  assert loaded.num_classes == 5
  assert loaded.shape == (18, 18, channels)
  for source in (loaded.train, loaded.test):
    batch = everything(source)
    assert batch["image"].shape == (12, 18, 18, channels)
    assert batch["image"].dtype == np.float32
    codes = batch["image"] * 255
    # float32 of k / 255 * 255.
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    assert 0 <= batch["image"].min() and batch["image"].max() <= 1
    assert batch["label"].tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]


def test_finished_batches_share_no_memory_with_those_of_workers():
  """Otherwise a device array would keep a worker's shared memory alive."""
  source = data.load("synthetic").train
  handed = source.draw(np.arange(8), seed=0, start=0)
  seen = source.finish(handed)
  for name in ("image", "label"):
    assert not np.shares_memory(seen[name], handed[name])
  np.testing.assert_array_equal(seen["label"], handed["label"])


def test_classes_can_be_learned_and_train_and_test_differ():
  loaded = data.load("synthetic", classes=10, examples=100, image_size=8)
  train, test = everything(loaded.train), everything(loaded.test)
  flat = train["image"].reshape(100, -1)
  means = np.stack([flat[train["label"] == c].mean(0) for c in range(10)])
  far = ((test["image"].reshape(100, 1, -1) - means[None]) ** 2).sum(-1)
  assert (far.argmin(1) == test["label"]).all()
  images = {x.tobytes() for x in (*train["image"], *test["image"])}
  assert len(images) == 200


def test_synthetic_images_depend_on_their_seed_alone():
  first, again, other = (
    everything(data.load("synthetic", seed=seed, examples=4).train)["image"]
    for seed in (0, 0, 1)
  )
  assert first.shape == (4, 32, 32, 3)
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)
