"""Ratios of benchmarks: read, recorded, compared; no time is tested."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tables import printed

from dr_jax import quant
from dr_jax.benchmarks import all as benchmarks
from dr_jax.benchmarks import history, quantizers, record
from dr_jax.benchmarks.rows import Rows, tables

PARTS = {part.name: part for part in benchmarks.PARTS}
MADE = record.Record(
  "2026-11-28",
  "abc1234",
  "EPYC, 2 cores",
  True,
  {"jax": "0.10.2"},
  {"hessian": {"a, of gradient": 2.0, "gone": 1.0}, "switch": {"b": 0.5}},
)


def later(**ratios):
  return record.Record(
    "2026-11-29", "def5678+", "EPYC, 2 cores", True, {}, {"hessian": ratios}
  )


def test_tables_are_read_as_they_were_printed():
  def print_two():
    for title in ("first", "second"):
      rows = Rows(title, ("kernel", "ms", "of copy"))
      rows.add("1 x 1", "0.5")
      rows.add(title, "1.5", "3.00")
      rows.end()

  assert tables(printed(print_two)) == [
    [
      {"kernel": "1 x 1", "ms": "0.5", "of copy": ""},
      {"kernel": title, "ms": "1.5", "of copy": "3.00"},
    ]
    for title in ("first", "second")
  ]


def test_ratios_have_the_names_of_rows_and_columns():
  def print_table():
    rows = Rows("ResNet8", ("program", "bits", "ms", "of float32"), left=2)
    rows.add("float32", "", "2.0", "1.00")
    rows.add("carrier", "8", "1.0", "0.50")

  assert benchmarks.ratios(PARTS["inference"], printed(print_table)) == {
    "float32, of float32": 1.0,
    "carrier, bits 8, of float32": 0.5,
  }


def test_speeds_are_kept_as_ratios_of_times():
  text = "| workers | images/s | of one core |\n| --- |\n| 0 | 112 | 0.25 |\n"
  found = benchmarks.ratios(PARTS["data"], text)
  assert found == {PARTS["data"].first: 4.0}


def test_a_benchmark_without_its_columns_is_an_error():
  with pytest.raises(ValueError, match="hessian must print of gradient"):
    benchmarks.ratios(PARTS["hessian"], "| program | ms |\n| --- |\n| a | 1 |")


def test_ratios_that_grew_more_than_the_threshold_are_marked_and_counted():
  found = later(**{"a, of gradient": 3.1, "new": 9.0})

  def show(threshold):
    grown.append(benchmarks.compare(MADE, found, threshold))

  grown = []
  text = printed(show, 1.5)
  (table,) = tables(text)
  marked = {row["ratio"]: row[""] for row in table}
  assert marked == {"a, of gradient": "grew", "gone": "", "new": ""}
  assert table[0] | {"earlier": "2.00", "later": "3.10"} == table[0]
  assert "abc1234" in text and "1 grew by more than 1.5 times" in text
  assert "0 grew" in printed(show, 1.6)
  assert grown == [1, 0]


def test_records_are_read_as_they_were_written(tmp_path):
  MADE.write(tmp_path / "a.json")
  assert record.read(tmp_path / "a.json") == MADE


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("| a |", "a.json must be JSON of a run of benchmarks$"),
    ("[]", "a.json must be JSON .*, got date=None"),
    ({"quick": "yes"}, "a.json must be JSON .*, got quick='yes'"),
    ({"ratios": {"a": {"b": None}}}, "a.json must .*, got ratios="),
  ],
)
def test_a_file_that_is_no_record_is_an_error_that_names_it(
  tmp_path, text, message
):
  path = tmp_path / "a.json"
  MADE.write(path)
  if isinstance(text, dict):
    text = json.dumps(json.loads(path.read_text()) | text)
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    record.read(path)


def test_a_history_has_a_row_for_each_run_by_date():
  first = PARTS["hessian"].first
  text = printed(history.print_table, [later(**{first: 2.5}), MADE])
  (table,) = tables(text)
  assert [row["commit"] for row in table] == ["abc1234", "def5678+"]
  assert [row["hessian"] for row in table] == ["", "2.50"]
  assert table[0]["jax"] == "0.10.2"


def test_quantizers_are_compared_with_copies_in_turn():
  for name, bits, shape in (
    ("lsq", 4, (4, 8)),
    ("lsq_activation", 2, (2, 4, 8)),
  ):
    found = quantizers.measure(quant.get(name), bits, shape, rounds=3)
    assert found.size == 4 * 8 * (1 if name == "lsq" else 2) * 4
    assert found.copies.shape == (2, 3)
    assert found.forward.shape == found.backward.shape == (3,)
  # Five arrays of x's size in 2 + 3 seconds; copies take half of it.
  moved = quantizers.Measured(
    100, *map(np.array, ([2.0], [3.0], [[1.0], [1.5]]))
  )
  assert moved.speed() == 100
  assert moved.ratios() == (2, 2, 2)


@pytest.mark.parametrize("text", ["", "64", "3x0", "3,3"])
def test_shapes_of_other_forms_are_an_error(text):
  assert quantizers.shape_of("weight", "3x16x8") == (3, 16, 8)
  with pytest.raises(ValueError, match=f"weight must be like .*, got '{text}'"):
    quantizers.shape_of("weight", text)


@pytest.mark.slow
def test_a_run_is_written_and_compared_with_itself(tmp_path):
  def run(*arguments):
    line = [sys.executable, "-m", "dr_jax.benchmarks.all", "--quick"]
    line += ["--benchmarks=planes", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)

  ended = run("--output=a.json")
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout.endswith("ratios: a.json\n")
  made = record.read(tmp_path / "a.json")
  assert PARTS["planes"].first in made.ratios["planes"]
  slower = {name: 0.01 * ratio for name, ratio in made.ratios["planes"].items()}
  record.now(True, {"planes": slower}).write(tmp_path / "b.json")
  ended = run("--against=b.json", "--output=c.json")
  assert ended.returncode == 1, ended.stderr
  assert f"{len(slower)} grew by more than 1.5 times" in ended.stdout
