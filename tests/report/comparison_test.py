"""Tests of the tables and the figure of a comparison, on results by hand."""

import matplotlib.image

from dr_jax import report


def value(mean, std=0.5):
  return {"mean": mean, "std": std, "seeds": [mean - std, mean + std]}


def row(scores, bytes_at, tensor_bytes, seconds):
  return {
    "scores": {
      bits: {"accuracy": value(a), "loss": value(0.25, 0.125)}
      for bits, a in scores.items()
    },
    "bytes_at": bytes_at,
    "tensor_bytes": tensor_bytes,
    "train_seconds": seconds,
  }


RESULTS = {
  "task": "classification",
  "rows": {
    "float": row({"float": 97.0}, {"float": 4000}, 4000, 10.0),
    "double rounding": row(
      {"8": 96.0, "2": 90.0}, {"8": 1000, "2": 400}, 1100, 20.25
    ),
    "binary": row({"1": 80.0}, {"1": 200}, 200, 5.0),
  },
  "seeds": (0, 1),
}


def test_every_method_has_a_row_and_every_bit_width_a_column():
  table = report.comparison_table(RESULTS)
  assert [column.header for column in table.columns] == [
    "method", "float", "8 bits", "2 bits", "1 bit", "bytes stored",
    "training s",
  ]  # fmt: skip
  cells = list(zip(*(column.cells for column in table.columns), strict=True))
  assert cells[1] == (
    "double rounding",
    "",
    "96.00 ± 0.50\n0.250 ± 0.125\n1,000",
    "90.00 ± 0.50\n0.250 ± 0.125\n400",
    "",
    "1,100",
    "20.2",
  )


def test_a_comparison_of_language_models_has_bits_per_byte():
  results = {**RESULTS, "task": "language"}
  lines = report.comparison_markdown(results).splitlines()
  # 0.25 / ln 2 and 0.125 / ln 2.
  assert "0.3607 ± 0.1803<br>0.250 ± 0.125<br>1,000" in lines[3]
  title = report.comparison_table(results).title
  assert str(title).startswith("bits per byte (mean")


def test_the_text_file_has_the_same_cells():
  lines = report.comparison_markdown(RESULTS).splitlines()
  assert len(lines) == 5
  assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
  assert lines[3] == (
    "| double rounding |  | 96.00 ± 0.50<br>0.250 ± 0.125<br>1,000 | 90.00 ± "
    "0.50<br>0.250 ± 0.125<br>400 |  | 1,100 | 20.2 |"
  )


def test_the_figure_is_an_image_and_the_same_for_the_same_results(tmp_path):
  paths = [tmp_path / name for name in ("a.png", "b.svg", "c.svg")]
  for path in paths:
    report.plot_comparison(path, RESULTS)
  assert matplotlib.image.imread(paths[0]).shape[0] > 100
  text = paths[1].read_text()
  assert "<svg" in text and "<dc:date>" not in text
