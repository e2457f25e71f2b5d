"""Tests of the stage report."""

import json

import pytest
from mixed_job import STRATEGIES, config

from dr_jax import pipeline, report
from dr_jax.config import ConfigError


def test_a_search_ends_with_a_figure_and_its_points_as_json(finished):
  workdir, _ = finished
  assert (workdir / "report" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
  points = json.loads((workdir / "search" / "pareto.json").read_text())
  assert set(points["points"]) == set(STRATEGIES)


def test_a_missing_extra_raises_an_error_before_training(monkeypatch, tmp_path):
  def missing(width, height):
    raise ImportError("figures need matplotlib: pip install 'dr_jax[report]'")

  monkeypatch.setattr(report, "new_figure", missing)
  with pytest.raises(ConfigError, match=r"report after search: .*\[report\]'"):
    pipeline.run(config(), tmp_path / "run")
  assert not (tmp_path / "run").exists()
