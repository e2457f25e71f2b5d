"""Tests on data sets that TFDS itself has prepared, without TensorFlow."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from dr_jax import data


def _by_number(directory, name, split):
  """Reads a data set with TFDS, decoding as it does."""
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(f"{directory}/{name}/1.0.0")
  return list(builder.as_data_source(split))


@pytest.mark.parametrize(("name", "channels"), [("blobs", 3), ("grays", 1)])
def test_a_data_set_is_read_as_tfds_reads_it(prepared, name, channels):
  loaded = data.load("tfds", dataset=name, path=prepared)
  assert loaded.num_classes == 3
  assert loaded.shape == (20, 24, channels)
  assert (len(loaded.train), len(loaded.test)) == (24, 10)
  for source, split in ((loaded.train, "train"), (loaded.test, "test")):
    records = _by_number(prepared, name, split)
    for index in range(len(source)):
      example, record = source[index], records[index]
      assert example["label"] == record["label"]
      want = record["image"] / np.float32(255)
      np.testing.assert_array_equal(example["image"], want)


def test_images_stay_encoded_until_they_are_drawn(prepared):
  source = data.load("tfds", dataset="blobs", path=prepared).train
  image, label = source.examples.read(0)
  assert isinstance(image, bytes) and type(label) is int


def test_splits_are_named_as_tfds_names_them(prepared):
  loaded = data.load(
    "tfds",
    dataset="blobs",
    path=prepared,
    train_split="train[:75%]",
    test_split="train[75%:]",
  )
  assert (len(loaded.train), len(loaded.test)) == (18, 6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"dataset": "cifar10"},
      r"dataset 'cifar10' is not prepared in {path}/cifar10/3\.0\.2; "
      r"prepare it: tfds build cifar10 --data_dir={path} "
      r"--file_format=array_record \(",
    ),
    (
      {"dataset": "cifer10"},
      r"dataset must be .*such as cifar10.* 'cifer10' is unknown",
    ),
    ({"dataset": ""}, r"dataset must be a name of TFDS.* '' "),
    (
      {"dataset": "blobs", "train_split": "validation"},
      r"train_split must be one of train, test, or .*, got 'validation'$",
    ),
  ],
)
def test_missing_data_is_one_line_that_says_what_to_do(
  prepared, options, message
):
  with pytest.raises(ValueError) as error:
    data.load("tfds", path=prepared, **options)
  assert re.search(message.format(path=prepared), str(error.value))
  assert "\n" not in str(error.value)
  assert not (pathlib.Path(prepared) / "cifar10").exists()


def test_the_default_directory_is_not_part_of_the_command(
  monkeypatch, tmp_path
):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with pytest.raises(ValueError, match=r"tfds build mnist --file_format=array"):
    data.load("tfds", dataset="mnist")


def test_a_data_set_without_labels_is_an_error(prepared):
  import tensorflow_datasets as tfds

  class Numbers(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
      features = {"number": tfds.features.Scalar(dtype=np.int64)}
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield 0, {"number": 0}

  Numbers(data_dir=prepared, file_format="array_record").download_and_prepare()
  with pytest.raises(
    ValueError, match="dataset must have an image and a class label, but"
  ):
    data.load("tfds", dataset="numbers", path=prepared)


def test_an_unreadable_record_is_named_by_split_and_number(prepared):
  loaded = data.load(
    "tfds", dataset="torn", path=prepared, on_decode_error="skip"
  )
  with pytest.warns(UserWarning) as warned:
    list(data.epoch(loaded.train, batch_size=8))
  names = sorted(str(w.message).split(":")[0] for w in warned)
  assert len(names) == 2
  assert all(name.startswith("torn/1.0.0 train ") for name in names)
  loaded = data.load("tfds", dataset="torn", path=prepared)
  with pytest.raises(
    data.UnreadableImage,
    match=r"torn/1\.0\.0 train 10 cannot be read \(image file is",
  ):
    list(data.epoch(loaded.train, batch_size=8))


@pytest.mark.slow
def test_training_on_a_data_set_never_imports_tensorflow(prepared, tmp_path):
  code = f"""
import sys
from dr_jax import pipeline
from dr_jax.config import from_dict

config = from_dict({{
  "stages": ["pretrain"],
  "data": {{"name": "tfds", "dataset": "blobs", "path": {prepared!r},
           "augment": "pad_and_crop", "image_size": 8, "batch_size": 8}},
  "model": {{"name": "resnet", "options": {{"depth": 8, "widths": [4, 4, 4]}}}},
  "pretrain": {{"epochs": 1}},
}})
summary = pipeline.run(config, {str(tmp_path / "run")!r})
assert "accuracy" in summary["stages"]["pretrain"]["scores"]["float"]
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True)
