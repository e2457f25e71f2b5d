"""Real data sets on disk, made of synthetic images."""

import io

import numpy as np
import pytest
from PIL import Image

SPLITS = {"train": 12, "test": 5}


def picture(seed, shape=(20, 24, 3)):
  """A smooth image, uint8 [H, W, C]: JPEG keeps it nearly as it is."""
  coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, shape[-1]))
  image = Image.fromarray(coarse.astype(np.uint8).squeeze())
  resized = image.resize(shape[1::-1], Image.Resampling.BILINEAR)
  return np.asarray(resized).reshape(shape)


def encoded(pixels, kind="png"):
  """The bytes of an image file."""
  file = io.BytesIO()
  Image.fromarray(pixels.squeeze()).save(file, kind)
  return file.getvalue()


@pytest.fixture(name="picture")
def picture_fixture():
  return picture


@pytest.fixture(name="encoded")
def encoded_fixture():
  return encoded


@pytest.fixture
def make_folder(tmp_path):
  """Writes SPLIT/CLASS/NAME for two classes; returns the directory."""

  def make(name="images", shape=(20, 24, 3)):
    for split, count in SPLITS.items():
      for label, kind in enumerate(("cat", "dog")):
        directory = tmp_path / name / split / kind
        directory.mkdir(parents=True)
        for number in range(count):
          suffix, form = (("png", "png"), ("JPG", "jpeg"))[number % 2]
          pixels = picture(1000 * label + 100 * len(split) + number, shape)
          path = directory / f"{number:02}.{suffix}"
          path.write_bytes(encoded(pixels, form))
    return tmp_path / name

  return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
  """A data directory of TFDS that holds `blobs`, and `grays` of 1 channel."""
  tfds = pytest.importorskip("tensorflow_datasets")
  directory = str(tmp_path_factory.mktemp("tfds"))

  class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # No checksums of downloads lie beside it.
    channels = 3
    damaged = ()

    def _info(self):
      shape = (None, None, self.channels)
      features = {
        "image": tfds.features.Image(shape=shape, encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["cat", "dog", "owl"]),
        "number": tfds.features.Scalar(dtype=np.int64),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {
        name: self._generate_examples(len(name), 2 * count)
        for name, count in SPLITS.items()
      }

    def _generate_examples(self, seed, count):
      for number in range(count):
        pixels = picture(100 * seed + number, (20, 24, self.channels))
        file = encoded(pixels)
        if number in self.damaged:
          file = file[: len(file) // 2]
        yield (
          number,
          {"image": io.BytesIO(file), "label": number % 3, "number": number},
        )

  class Blobs(_Builder):
    pass

  class Grays(_Builder):
    channels = 1

  class Torn(_Builder):
    damaged = (3, 4)

  for kind in (Blobs, Grays, Torn):
    kind(data_dir=directory, file_format="array_record").download_and_prepare()
  return directory
