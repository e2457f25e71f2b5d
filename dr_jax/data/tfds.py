"""Image data sets of TensorFlow Datasets, read without TensorFlow.

They are read as array_record files, which give random access. Images stay
encoded until the transformation, so that worker processes decode them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import shlex
from collections.abc import Iterator
from typing import Any

from absl import logging

from dr_jax.data.decoding import UnreadableImage
from dr_jax.data.sources import MissingData


@dataclasses.dataclass(frozen=True)
class Records:
  """One split of a data set.

  Attributes:
    source: a `tfds.core` data source of {"image": bytes, "label": int}.
    split: its name in TFDS, for messages.
  """

  source: Any
  split: str

  def __len__(self) -> int:
    return len(self.source)

  def read(self, index: int) -> tuple[bytes, int]:
    """Returns the encoded image of a record, and its label."""
    try:
      record = self.source[index]
    # What array_record and the parser raise for bytes that are not a record.
    except Exception as error:
      raise UnreadableImage(str(error) or type(error).__name__) from None
    return record["image"], int(record["label"])

  def name(self, index: int) -> str:
    """Returns data set, split and number of a record."""
    return f"{self.source.dataset_info.full_name} {self.split} {index}"


def open_splits(
  dataset: str, path: str, train_split: str, test_split: str
) -> tuple[Records, Records, int, int]:
  """Opens two splits of a data set that is prepared on this machine.

  Args:
    dataset: name, as "cifar10" or "imagenet_resized/32x32".
    path: the data directory of TFDS; "" for its default.
    train_split: name of a split, also a slice as "train[:90%]".
    test_split: likewise.

  Returns:
    (training split, test split, number of classes, number of channels).

  Raises:
    MissingData: if the data set is not prepared; the message holds the command
      that prepares it.
    ValueError: if the data set is unknown, or has no such split, or no image
      and label.
  """
  # Slow to import, and only this kind of data set needs it.
  import tensorflow_datasets as tfds

  with _without_warnings():
    found = _find(tfds, dataset, path)
    prepared = found.is_prepared()
  if not prepared:
    num_classes, shape = _shape(tfds, found, dataset)
    raise MissingData(
      f"dataset {dataset!r} is not prepared in {found.data_path}; prepare it: "
      f"{_command(dataset, path)}",
      shape=shape,
      num_classes=num_classes,
    )
  # The files alone: worker processes need not import what prepared them.
  builder = tfds.builder_from_directory(found.data_path)
  num_classes, shape = _shape(tfds, builder, dataset)
  train, test = (
    _open(tfds, builder, name, split, _command(dataset, path))
    for name, split in (
      ("train_split", train_split),
      ("test_split", test_split),
    )
  )
  return train, test, num_classes, shape[-1]


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
  """Keeps TFDS from logging what our errors say as well."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _find(tfds: Any, dataset: str, path: str) -> Any:
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


def _shape(
  tfds: Any, builder: Any, dataset: str
) -> tuple[int, tuple[Any, ...]]:
  """The number of classes, and the shape of an image, None for open sides."""
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
  return label.num_classes, image.shape


def _open(
  tfds: Any, builder: Any, name: str, split: str, command: str
) -> Records:
  known = builder.info.splits
  if split.split("[")[0] not in known:
    raise ValueError(
      f"{name} must be one of {', '.join(known)}, or a slice of one, got "
      f"{split!r}"
    )
  try:
    source = builder.as_data_source(
      split, decoders={"image": tfds.decode.SkipDecoding()}
    )
  except NotImplementedError:
    raise ValueError(
      f"dataset {builder.info.full_name} is prepared in another file format; "
      f"prepare it again: {command}, with --overwrite"
    ) from None
  return Records(source, split)


def _command(dataset: str, path: str) -> str:
  """The shell command that prepares a data set."""
  directory = f"--data_dir={shlex.quote(path)} " if path else ""
  return (
    f"tfds build {shlex.quote(dataset)} {directory}--file_format=array_record "
    "(this command needs TensorFlow and importlib_resources, training does not)"
  )
