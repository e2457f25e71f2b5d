"""Tests of the search report, on rows made by hand."""

import json

import matplotlib.image
import pytest

from dr_jax import report


def row(strategy, budget, bits, accuracy, loss=0.5):
  return {
    "strategy": strategy,
    "budget": budget,
    "allocation": {"conv1": bits, "conv2": bits},
    "cost": {"stored_bits": 800 * bits, "bops": 1000 * bits * bits},
    "eval": {"accuracy": 0.0, "loss": 9.0},
    "test": {"accuracy": accuracy, "loss": loss},
    "evaluations": 7,
    "seconds": 0.25,
    "evaluation_seconds": 1.5,
  }


ROWS = [
  row("greedy", 4, 4, 95.0, 0.2),
  row("uniform", 4, 4, 94.0, 0.1),
  row("uniform", 2, 2, 90.0, 0.9),
  row("greedy", 8, 8, 94.5, 0.3),
]


def test_the_front_holds_rows_that_no_cheaper_row_beats_on_the_test_set():
  assert report.front(ROWS, "stored_bits") == [ROWS[2], ROWS[0]]
  assert report.front(ROWS, "stored_bits", "language") == [ROWS[2], ROWS[1]]


def test_the_cheapest_of_equal_scores_is_on_the_front():
  rows = [row("a", 8, 8, 90.0), row("b", 2, 2, 90.0)]
  assert report.front(rows, "bops") == [rows[1]]


def test_every_point_is_given_in_bytes_and_bops():
  content = report.search_summary(ROWS)
  assert json.loads(json.dumps(content)) == content
  assert content["front"] == {
    "stored_bits": [["uniform", 2], ["greedy", 4]],
    "bops": [["uniform", 2], ["greedy", 4]],
  }
  assert [p["budget"] for p in content["points"]["greedy"]] == [4, 8]
  assert content["points"]["uniform"][0] == {
    "budget": 4,
    "stored_bytes": 400,
    "bops": 16000,
    "accuracy": 94.0,
    "loss": 0.1,
    "eval": {"accuracy": 0.0, "loss": 9.0},
    "evaluations": 7,
    "seconds": 0.25,
    "evaluation_seconds": 1.5,
    "allocation": {"conv1": 4, "conv2": 4},
  }


def test_the_plot_is_an_image_that_depends_on_the_rows(tmp_path):
  pictures = []
  for name, rows in (("a", ROWS), ("b", ROWS[:2])):
    path = tmp_path / f"{name}.png"
    report.plot_searches(path, rows)
    pictures.append(matplotlib.image.imread(path))
  first, second = pictures
  assert first.shape[1] > first.shape[0] > 100
  assert first.shape == second.shape and (first != second).any()


def test_the_table_has_a_row_for_every_search():
  table = report.search_table(ROWS, title="searches")
  cells = list(zip(*(column.cells for column in table.columns), strict=True))
  assert cells[0] == (
    "4", "greedy", "95.00", "0.2000", "400", "0.02", "7", "0.2", "1.5"
  )  # fmt: skip
  assert len(cells) == len(ROWS)


@pytest.mark.parametrize("cost", ["stored_bits", "bops"])
def test_the_front_of_no_rows_is_empty(cost):
  assert report.front([], cost) == []
