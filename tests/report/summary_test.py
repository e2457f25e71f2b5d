"""Tests of the table that a run ends with, on a summary made by hand."""

import copy

import pytest

from dr_jax import report


def score(accuracy):
  return {"accuracy": accuracy, "loss": 1 - accuracy / 100}


SUMMARY = {
  "name": "small",
  "task": "classification",
  "bits": (8, 2),
  "stages": {
    "pretrain": {"scores": {"float": score(97.0)}},
    "multi_precision": {"scores": {"8": score(96.0), "2": score(90.0)}},
    "separate/8": {"scores": {"8": score(96.5)}},
    "separate/2": {"scores": {"2": score(91.25)}},
    "export": {
      "scores": {"8": score(96.0), "2": score(90.0)},
      "bytes_at": {"8": 1000, "2": 400},
      "float_bytes": 4000,
      "stored_bytes": 1100,
    },
  },
}


def rows(without=()):
  """The cells of every row, without the results of some stages."""
  summary = copy.deepcopy(SUMMARY)
  for stage in without:
    del summary["stages"][stage]
  columns = report.summary_table(summary).columns
  return list(zip(*(column.cells for column in columns), strict=True))


SEPARATE = ("separate/8", "separate/2")


def test_every_bit_width_has_a_row_below_the_float_network():
  assert rows(SEPARATE) == [
    ("float", "97.00", "0.0300", "4,000", "100.0"),
    ("8", "96.00", "0.0400", "1,000", "25.0"),
    ("2", "90.00", "0.1000", "400", "10.0"),
  ]


def test_separate_networks_have_a_column():
  assert [row[-1] for row in rows()] == ["", "96.50", "91.25"]


def test_separate_networks_have_rows_also_without_a_joint_one():
  assert rows(("multi_precision", "export"))[1:] == [
    ("8", "", "", "", "", "96.50"),
    ("2", "", "", "", "", "91.25"),
  ]


def test_sizes_are_empty_before_the_export():
  assert rows((*SEPARATE, "export")) == [
    ("float", "97.00", "0.0300", "", ""),
    ("8", "96.00", "0.0400", "", ""),
    ("2", "90.00", "0.1000", "", ""),
  ]


@pytest.mark.parametrize(
  ("without", "caption"), [((), True), (("export",), False)]
)
def test_the_caption_gives_the_size_of_the_artifact(without, caption):
  stages = {k: v for k, v in SUMMARY["stages"].items() if k not in without}
  table = report.summary_table({**SUMMARY, "stages": stages})
  assert bool(table.caption) == caption
  assert not caption or "1,100 bytes, 27.5 % of float" in table.caption


def test_a_language_model_has_bits_per_byte():
  columns = report.summary_table({**SUMMARY, "task": "language"}).columns
  assert columns[1].header == "bits per byte"
  # 0.03 / ln 2 and 0.04 / ln 2.
  assert list(columns[1].cells)[:2] == ["0.0433", "0.0577"]
