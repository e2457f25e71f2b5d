"""Tests of pages: their structure, and what a browser shows of them."""

import html.parser
import json
import sys

import browser
import plotly.graph_objects
import pytest
import report_files

from dr_jax import report
from dr_jax.report import page

RUN_CHARTS = [
  "accuracy",
  *("loss-pretrain", "loss-multi-precision", "loss-separate", "loss-supernet"),
  *("scale-gradients-multi-precision", "scale-gradients-supernet"),
  *("scale-gradients", "weights", "traces"),
  *("pareto-stored-bits", "pareto-bops", "sizes", "seconds"),
]
CURVES = [
  name for name in RUN_CHARTS if name.startswith(("loss-", "scale-gradients-"))
]


class Parsed(html.parser.HTMLParser):
  """The charts of a page, its headings, and all that it refers to."""

  def __init__(self, text):
    super().__init__()
    self.links, self.ids, self.charts, self.text = [], [], [], ""
    self._script = None
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    given = dict(attrs)
    self._script = given.get("id", "") if tag == "script" else None
    self.links += [given[k] for k in ("src", "href") if k in given]
    if given.get("class") == "chart":
      self.ids.append(given["id"])

  def handle_endtag(self, tag):
    if tag == "script":
      self._script = None

  def handle_data(self, data):
    if self._script is None:
      self.text += data
    elif self._script == "charts":
      self.charts += json.loads(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """A page of each kind, as text."""
  folder = tmp_path_factory.mktemp("runs")
  whole = report.read_run(report_files.write_run(folder / "whole"))
  early = report.read_run(
    report_files.write_run(
      folder / "early",
      without=(*("search", "hessian", "supernet", "report/network.json"),),
    )
  )
  compared = report.read_comparison(
    report_files.write_comparison(folder / "compared")
  )
  return {
    "run": report.run_page(whole),
    "comparison": report.comparison_page("compared", compared),
    "runs": report.runs_page({"a": whole, "b": early}),
  }


@pytest.mark.parametrize(
  ("kind", "names"),
  [
    ("run", RUN_CHARTS),
    ("comparison", ["methods", "training-seconds"]),
    ("runs", ["runs", "runs-bytes"]),
  ],
)
def test_every_chart_of_a_page_has_a_place_and_valid_data(pages, kind, names):
  parsed = Parsed(pages[kind])
  assert parsed.ids == names == [chart["name"] for chart in parsed.charts]
  for chart in parsed.charts:
    # Raises for what plotly does not know.
    figure = plotly.graph_objects.Figure(chart["figure"])
    assert figure.data and all(
      any(y is not None for y in trace.y) for trace in figure.data if trace.y
    )


@pytest.mark.parametrize("kind", ["run", "comparison", "runs"])
def test_a_page_refers_to_nothing_outside_of_it(pages, kind):
  assert Parsed(pages[kind]).links == ["data:,"]
  style = pages[kind].partition("</style>")[0]
  assert "url(" not in style and "@import" not in style


def test_words_of_a_run_are_no_markup(tmp_path):
  name = "</script><script>alert(1)</script>"
  run = report.read_run(report_files.write_run(tmp_path / "run", name=name))
  parsed = Parsed(report.run_page(run))
  assert name in parsed.text
  assert [chart["name"] for chart in parsed.charts] == RUN_CHARTS
  # In a chart, and so in a script, and where plotly.js reads tags.
  parsed = Parsed(report.runs_page({name: run}))
  (line,) = parsed.charts[0]["figure"]["data"]
  escaped = "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;"
  assert line["name"] == escaped
  # And of the methods of a comparison.
  compared = report.read_comparison(
    report_files.write_comparison(tmp_path / "compared")
  )
  rows = compared["rows"]
  compared["rows"] = {"float": rows["float"], name: rows["double rounding"]}
  methods, seconds = Parsed(report.comparison_page("x", compared)).charts
  assert escaped in [line["name"] for line in methods["figure"]["data"]]
  assert seconds["figure"]["data"][0]["y"] == ["float", escaped]


def test_a_line_of_a_search_goes_from_low_to_high_cost(tmp_path):
  run = report.read_run(report_files.write_run(tmp_path / "run"))
  run.stages["search"]["rows"].sort(key=lambda row: -row["cost"]["bops"])
  charts = Parsed(report.run_page(run)).charts
  (chart,) = (chart for chart in charts if chart["name"] == "pareto-bops")
  _, *lines = chart["figure"]["data"]
  assert max(len(line["x"]) for line in lines) > 1
  assert all(line["x"] == sorted(line["x"]) for line in lines)


@pytest.mark.parametrize(
  ("without", "charts"),
  [
    (("metrics.jsonl",), CURVES),
    (("report/network.json",), ["scale-gradients", "weights"]),
    (("hessian",), ["traces"]),
    (("search",), ["pareto-stored-bits", "pareto-bops"]),
    (("export",), ["sizes"]),
    (("multi_precision", "supernet", *map("separate/{}".format, (8, 4, 2))),
     ["accuracy"]),
  ],
)  # fmt: skip
def test_a_chart_without_data_is_left_out(tmp_path, without, charts):
  run = report_files.write_run(tmp_path / "run", without=without)
  parsed = Parsed(report.run_page(report.read_run(run)))
  assert parsed.ids == [name for name in RUN_CHARTS if name not in charts]


def test_steps_of_phases_follow_each_other(pages):
  (chart,) = (
    c
    for c in Parsed(pages["run"]).charts
    if c["name"] == "loss-multi-precision"
  )
  line, *_, validation = chart["figure"]["data"]
  assert line["name"] == "8 bits" and len(chart["figure"]["data"]) == 6
  assert validation["name"] == "2 bits, validation"
  assert validation["x"] == [40, 50, 60]
  assert line["x"] == [10, 20, 30, 40, 50, 60]
  assert line["y"] == [0.2, 0.1, None, 0.2, 0.1, None]


def test_gradients_of_scales_have_a_line_for_each_bit_width(pages):
  name = "scale-gradients-multi-precision"
  (chart,) = (c for c in Parsed(pages["run"]).charts if c["name"] == name)
  figure = chart["figure"]
  assert [line["name"] for line in figure["data"]] == [
    *("8 bits", "4 bits", "2 bits")
  ]
  assert figure["data"][2]["x"] == [10, 20, 30, 40, 50, 60]
  # What is not finite leaves a gap.
  assert figure["data"][2]["y"] == pytest.approx([0.4, 0.3, None] * 2)
  assert figure["layout"]["yaxis"]["type"] == "log"
  assert figure["layout"]["xaxis"]["title"]["text"] == "step"


def test_a_log_without_gradients_of_scales_has_no_chart_of_them(tmp_path):
  path = report_files.write_run(tmp_path / "run") / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(x for x in lines if "scale_gradient" not in x))
  parsed = Parsed(report.page_of(tmp_path / "run"))
  assert parsed.ids == [
    name for name in RUN_CHARTS if not name.startswith("scale-gradients-")
  ]


def test_a_point_of_the_front_has_its_allocation(pages):
  (chart,) = (
    c for c in Parsed(pages["run"]).charts if c["name"] == "pareto-bops"
  )
  front, greedy, _ = chart["figure"]["data"]
  assert front["x"] == [4, 6] and front["y"] == [94.0, 96.0]
  hovered, picked = greedy["customdata"][0]
  assert "1,200 bytes" in hovered and "bits: 8 2 2" in hovered
  assert picked == (
    "greedy, budget 4 bits: stage1/conv1: 8, stage1/conv2: 2, head/<b>: 2"
  )


@pytest.mark.parametrize(
  ("file", "change", "message"),
  [
    ("summary.json", lambda s: s.update(task="x"), "task must be one of"),
    (
      "summary.json",
      lambda s: s["stages"]["export"]["bytes_at"].pop("4"),
      r"stages\.export\.bytes_at must be .* 4",
    ),
    ("report/network.json", lambda n: n.pop("weights"), "must be .* weights"),
  ],
)
def test_a_damaged_file_is_named_in_the_error(tmp_path, file, change, message):
  path = report_files.write_run(tmp_path / "run") / file
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=f"{file} is damaged: .*{message}"):
    report.read_run(tmp_path / "run")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda r: r.pop("seeds"), "it must be an object with .*seeds"),
    (
      lambda r: r["rows"]["binary"]["bytes_at"].pop("1"),
      r"rows\.binary\.bytes_at must be of .* \['1'\], got \[\]",
    ),
    (
      lambda r: r["rows"].update(float=r["rows"]["binary"]),
      "rows.float must have scores of float",
    ),
  ],
)
def test_a_damaged_comparison_is_named_in_the_error(tmp_path, change, message):
  path = report_files.write_comparison(tmp_path / "compared") / "compare.json"
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=f"compare.json is damaged: {message}"):
    report.read_comparison(tmp_path / "compared")


def test_scores_that_are_not_finite_leave_a_gap(tmp_path):
  path = report_files.write_comparison(tmp_path / "compared") / "compare.json"
  path.write_text(path.read_text().replace("80.0", "NaN"))
  charts = Parsed(report.page_of(tmp_path / "compared")).charts
  assert charts[0]["figure"]["data"][1]["y"] == [None]


def test_runs_of_different_tasks_have_no_common_page(tmp_path):
  run = report.read_run(report_files.write_run(tmp_path / "run"))
  other = run._replace(task="language")
  with pytest.raises(ValueError, match="same task, got classification and lan"):
    report.runs_page({"a": run, "b": other})


def test_a_missing_extra_is_named_in_the_error(monkeypatch):
  monkeypatch.setitem(sys.modules, "plotly.offline", None)
  with pytest.raises(ImportError, match=r"pip install 'dr_jax\[report\]'"):
    page.render_page("page", [])


@pytest.mark.slow
@pytest.mark.skipif(
  browser.find() is None, reason="no chromium on this machine"
)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("kind", ["run", "comparison", "runs"])
def test_a_browser_draws_every_chart_without_an_error(
  pages, tmp_path, kind, width, dark
):
  path = tmp_path / "index.html"
  path.write_text(pages[kind])
  seen = browser.look(path, tmp_path, width=width, dark=dark)
  assert seen.errors == []
  assert list(seen.charts) == Parsed(pages[kind]).ids
  for name, chart in seen.charts.items():
    assert chart["marks"] > 0, name
    assert 0.8 * min(width, 1080) < chart["width"] <= width, name
  assert seen.width == width  # Nothing overflows.
  assert seen.background == (
    "rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)"
  )
