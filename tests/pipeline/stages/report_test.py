"""Tests of the stage report."""

import json
import re
import sys

import pytest
from mixed_job import STRATEGIES, config

from dr_jax import pipeline, report
from dr_jax.config import ConfigError


def test_a_search_ends_with_a_figure_and_its_points_as_json(finished):
  workdir, _ = finished
  assert (workdir / "report" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
  assert "<svg" in (workdir / "report" / "pareto.svg").read_text()
  points = json.loads((workdir / "search" / "pareto.json").read_text())
  assert set(points["points"]) == set(STRATEGIES)


def test_the_page_has_all_charts_and_can_be_made_again(finished):
  workdir, _ = finished
  text = (workdir / "report" / "index.html").read_text()
  names = re.findall('<div class="chart" id="([^"]+)">', text)
  assert names == [
    *("accuracy", "loss-pretrain", "loss-multi-precision", "loss-supernet"),
    *("scale-gradients-multi-precision", "scale-gradients-supernet"),
    *("scale-gradients", "weights"),
    *("traces", "pareto-stored-bits", "pareto-bops", "sizes", "seconds"),
  ]
  assert report.run_page(report.read_run(workdir)) == text


def test_without_plotly_a_run_ends_without_a_page(copied, monkeypatch):
  (copied / "report" / "index.html").unlink()
  monkeypatch.setitem(sys.modules, "plotly.offline", None)
  with pytest.warns(UserWarning, match=r"report/index.html: .*\[report\]'"):
    pipeline.run(config(), copied)
  assert not (copied / "report" / "index.html").exists()


def test_a_missing_extra_raises_an_error_before_training(monkeypatch, tmp_path):
  def missing(width, height):
    raise ImportError("figures need matplotlib: pip install 'dr_jax[report]'")

  monkeypatch.setattr(report, "new_figure", missing)
  with pytest.raises(ConfigError, match=r"report after search: .*\[report\]'"):
    pipeline.run(config(), tmp_path / "run")
  assert not (tmp_path / "run").exists()
