"""Image data sets of TensorFlow Datasets, read without TensorFlow.

They are read as array_record files, which give random access. Images stay
encoded until the transformation, so that worker processes decode them.
"""

import contextlib
import dataclasses
import difflib
import shlex
from typing import Any

from absl import logging

from dr_jax.data.transforms import UnreadableImage


@dataclasses.dataclass(frozen=True)
class Records:
  """One split of a data set.

  Attributes:
    source: a `tfds.core` data source of {"image": bytes, "label": int}.
    split: as named in the configuration.
  """

  source: Any
  split: str

  def __len__(self):
    return len(self.source)

  def read(self, index):
    """Returns the encoded image of a record, and its label."""
    try:
      record = self.source[index]
    # What array_record and the parser raise for bytes that are not a record.
    except Exception as error:
      raise UnreadableImage(str(error) or type(error).__name__) from None
    return record["image"], int(record["label"])

  def name(self, index):
    """Returns data set, split and number of a record."""
    return f"{self.source.dataset_info.full_name} {self.split} {index}"


def open_splits(dataset, path, splits):
  """Opens splits of a data set that is prepared on this machine.

  Args:
    dataset: name, as "cifar10" or "imagenet_resized/32x32".
    path: the data directory of TFDS; "" for its default.
    splits: names, also slices as "train[:90%]".

  Returns:
    (a `Records` per split, number of classes, number of channels).

  Raises:
    ValueError: if the data set is unknown, not prepared, has no such split, or
      no image and label. If it is not prepared, the message holds the command
      that prepares it.
  """
  # Slow to import, and only this kind of data set needs it.
  import tensorflow_datasets as tfds

  with _without_warnings():
    found = _find(tfds, dataset, path)
    prepared = found.is_prepared()
  if not prepared:
    raise ValueError(
      f"dataset {dataset!r} is not prepared in {found.data_path}; prepare it: "
      f"{_command(dataset, path)}"
    )
  # The files alone: worker processes need not import what prepared them.
  builder = tfds.builder_from_directory(found.data_path)
  features = dict(builder.info.features.items())
  image, label = (features.get(name) for name in ("image", "label"))
  if not isinstance(image, tfds.features.Image) or not isinstance(
    label, tfds.features.ClassLabel
  ):
    raise ValueError(
      "dataset must have an image and a class label, but "
      f"{dataset!r} has the features {', '.join(features)}"
    )
  channels = image.shape[-1]
  if channels not in (1, 3):
    raise ValueError(
      f"dataset must have 1 or 3 channels, but {dataset!r} has {channels}"
    )
  records = [_open(tfds, builder, dataset, split, path) for split in splits]
  return records, label.num_classes, channels


@contextlib.contextmanager
def _without_warnings():
  """TFDS warns of a directory in which it looks, and says no more than we."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _find(tfds, dataset, path):
  try:
    return tfds.builder(dataset, data_dir=path or None)
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
    known = tfds.list_builders(with_community_datasets=False)
    near = difflib.get_close_matches(dataset, known, 3, 0.7)
    hint = f", such as {', '.join(near)}" if near else ""
    unknown = isinstance(error, tfds.core.DatasetNotFoundError)
    what = "is unknown" if unknown else str(error).splitlines()[0]
    raise ValueError(
      f"dataset must be a name of TFDS{hint}, or of what is prepared in path, "
      f"but {dataset!r} {what}"
    ) from None


def _open(tfds, builder, dataset, split, path):
  name = split.split("[")[0]
  if name not in builder.info.splits:
    raise ValueError(
      f"split of {dataset!r} must be one of "
      f"{', '.join(builder.info.splits)}, got {split!r}"
    )
  try:
    source = builder.as_data_source(
      split, decoders={"image": tfds.decode.SkipDecoding()}
    )
  except NotImplementedError:
    raise ValueError(
      f"dataset {dataset!r} is prepared in another file format; prepare it "
      f"again: {_command(dataset, path)}, with --overwrite"
    ) from None
  return Records(source, split)


def _command(dataset, path):
  """The command that prepares a data set, from what a shell takes apart."""
  directory = f"--data_dir={shlex.quote(path)} " if path else ""
  return (
    f"tfds build {shlex.quote(dataset)} {directory}--file_format=array_record "
    "(this command needs TensorFlow and importlib_resources, training does not)"
  )
