"""Texts: sequences against slices of bytes, and the documentation of Python."""

import hashlib

import numpy as np
import pytest

from dr_jax import data
from dr_jax.data import text

TEXTS = {
  "train": {"b.txt": b"hello world", "a/c.txt": b"\xff\x00\xfe", "no.md": b"x"},
  "test": {"d.txt": b"another text"},
}


@pytest.fixture
def folder(tmp_path):
  for split, documents in TEXTS.items():
    for name, content in documents.items():
      file = tmp_path / split / name
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(content)
  return str(tmp_path)


def test_an_example_is_a_sequence_and_the_bytes_that_follow(folder):
  loaded = data.load("text", path=folder, length=4)
  assert loaded.task == "language" and loaded.labels == 4
  assert loaded.model_options == {"vocabulary": 256, "context": 4}
  # In the order of the SHA-256 of the names.
  ordered = sorted(("b.txt", "a/c.txt"), key=sha)
  whole = b"\0".join(TEXTS["train"][name] for name in ordered)
  assert len(loaded.train) == (len(whole) - 1) // 4 == 3
  for index in range(3):
    example = loaded.train[index]
    assert bytes(example["image"].tolist()) == whole[4 * index :][:4]
    assert bytes(example["label"].tolist()) == whole[4 * index + 1 :][:4]
  assert bytes(loaded.test[1]["label"].tolist()) == b"er t"


def sha(name):
  return hashlib.sha256(name.encode()).hexdigest()


def test_batches_and_epochs_have_every_sequence_once(folder):
  train = data.load("text", path=folder, length=2).train
  expected = [train[i]["image"].tolist() for i in range(len(train))]
  steps = data.batches(train, batch_size=len(train), seed=3)
  assert sorted(steps[0]["image"].tolist()) == sorted(expected)
  (batch,) = data.epoch(train, batch_size=8)
  rows = batch["image"][batch["mask"] > 0]
  assert rows.dtype == np.int32 and rows.tolist() == expected


def test_a_size_takes_the_first_bytes_of_each_text(folder):
  whole = data.load("text", path=folder, length=2)
  part = data.load("text", path=folder, length=2, bytes=7)
  for split in ("train", "test"):
    small, large = getattr(part, split), getattr(whole, split)
    assert len(small) == 3
    np.testing.assert_array_equal(small.text, large.text[:7])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"train_split": "dev"},
      "path must hold a directory 'dev' with .txt files",
    ),
    ({"length": 12}, "length must be below .* 'test', 12, got 12"),
    ({"length": 2, "bytes": 2}, "length must be below .* 'train', 2, got 2"),
  ],
)
def test_a_text_that_is_not_there_is_an_error_that_says_so(
  folder, options, message
):
  with pytest.raises(ValueError, match=message):
    data.load("text", path=folder, **options)


def test_an_index_out_of_range_is_an_error(folder):
  train = data.load("text", path=folder, length=4).train
  with pytest.raises(IndexError, match=r"0\.\.2, got 3"):
    train[3]


def test_docstrings_are_those_of_modules_classes_and_functions(tmp_path):
  file = tmp_path / "module.py"
  file.write_text(
    '"""Module."""\nclass A:\n  """Class."""\n  def f(self):\n    "Method."\n'
    '  x = "no docstring"\ndef g(): pass\n'
  )
  assert list(text._docstrings(file)) == ["Module.", "Class.", "Method."]
  file.write_text("def (:")
  assert not list(text._docstrings(file))


@pytest.fixture(scope="module")
def documentation():
  try:
    return text.documentation()
  except ValueError as error:
    pytest.skip(str(error))


def test_the_documentation_is_that_of_python(documentation):
  assert b"assert_stmt" in documentation["topics/assert"]
  assert b"JSON" in documentation["library/json/__init__.py"]
  assert not any("/test/" in name for name in documentation)
  assert sum(map(len, documentation.values())) > 10**6


def test_no_document_is_in_both_splits(documentation):
  loaded = data.load("text", length=16)
  documents = [
    set(bytes(source.text).split(b"\0"))
    for source in (loaded.train, loaded.test)
  ]
  assert not documents[0] & documents[1]
  sizes = [len(source.text) for source in (loaded.train, loaded.test)]
  # A tenth of the documents, of any size.
  assert 0.05 < sizes[1] / sum(sizes) < 0.2
