"""Tests of the stage report."""

import json

from mixed_job import STRATEGIES


def test_a_search_ends_with_a_figure_and_its_points_as_json(finished):
  workdir, _ = finished
  assert (workdir / "report" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
  points = json.loads((workdir / "search" / "pareto.json").read_text())
  assert set(points["points"]) == set(STRATEGIES)
