"""Shares of processes, and resumption, on data sets that lie on disk."""

import numpy as np
import pytest

from dr_jax import data

# 24 training images: six batches an epoch.
BATCH = 4


@pytest.fixture(params=["folder", "tfds"])
def source(request, make_folder):
  """Training images that differ, each as it is stored."""
  if request.param == "folder":
    return data.load("folder", path=str(make_folder())).train
  path = request.getfixturevalue("prepared")
  return data.load("tfds", dataset="blobs", path=path).train


def streams(source, count, **options):
  return [
    data.batches(
      source,
      batch_size=BATCH,
      seed=3,
      process_index=index,
      process_count=count,
      **options,
    )
    for index in range(count)
  ]


def images(batches, steps):
  return [image.tobytes() for step in steps for image in batches[step]["image"]]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_read_every_image_once_an_epoch(source, count):
  stored = [source[index]["image"].tobytes() for index in range(len(source))]
  assert len(set(stored)) == len(stored) and len(stored) % BATCH == 0
  steps = range(len(stored) // BATCH)
  seen = [images(batches, steps) for batches in streams(source, count)]
  assert {len(share) for share in seen} == {len(stored) // count}
  assert sorted(sum(seen, [])) == sorted(stored)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_resumes_in_the_middle_of_an_epoch(source, workers):
  _, share = streams(source, 2)
  _, resumed = streams(source, 2, workers=workers)
  stream = resumed.stream(3)
  for step in range(3, 7):
    batch = next(stream)
    np.testing.assert_array_equal(batch["image"], share[step]["image"])
    np.testing.assert_array_equal(batch["label"], share[step]["label"])
  stream.close()
