"""A comparison of methods, run for real on digits, only shortly."""

import json
import shutil
import types

import pytest
import unusual

from dr_jax import report
from dr_jax.config import ConfigError
from dr_jax.pipeline import comparison

VALUES = {
  "name": "small",
  "seeds": (0, 1),
  "data": {"name": "digits", "batch_size": 256},
  "devices": {"data": 1},
  "model": {"name": "resnet", "options": {"depth": 8, "widths": (2, 2, 2)}},
  "quant": {"bits": (8, 2)},
  "pretrain": {"epochs": 1},
  "train": {"epochs": 1, "vectorize": "sequential"},
  "methods": {
    "double_rounding": {"method": "double_rounding", "row": "joint"},
    "alone_8": {"method": "lsq", "row": "alone", "quant": {"bits": (8,)}},
    "alone_2": {"method": "lsq", "row": "alone", "quant": {"bits": (2,)}},
  },
}


def changed(**methods):
  return {**VALUES, "methods": methods}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("comparison")
  return workdir, comparison.run(comparison.from_values(VALUES), workdir)


def test_a_full_disk_is_an_error_before_the_float_network_is_trained(
  tmp_path, monkeypatch
):
  usage = types.SimpleNamespace(free=100_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  place = tmp_path / "seed0" / "float"
  with pytest.raises(
    ConfigError, match=f"^workdir {place}: its disk has 0.1 M"
  ):
    comparison.run(comparison.from_values(VALUES), tmp_path)
  assert not place.parent.exists()


@pytest.mark.slow
def test_every_method_runs_once_per_seed_from_the_same_float_network(finished):
  workdir, results = finished
  assert list(results["rows"]) == ["float", "joint", "alone"]
  for row in results["rows"].values():
    for score in row["scores"].values():
      assert len(score["accuracy"]["seeds"]) == 2
      assert 0 <= score["accuracy"]["mean"] <= 100
  for seed in (0, 1):
    stages = workdir / f"seed{seed}"
    assert (stages / "float" / "pretrain" / "result.json").exists()
    for name in VALUES["methods"]:
      assert not (stages / name / "pretrain").exists()
      config = json.loads((stages / name / "config.json").read_text())
      assert config["seed"] == seed


@pytest.mark.slow
def test_entries_of_one_row_add_their_costs_and_keep_their_bit_widths(finished):
  workdir, results = finished
  alone = results["rows"]["alone"]
  exports = [
    json.loads(
      (workdir / "seed0" / f"alone_{b}" / "export" / "result.json").read_text()
    )
    for b in (8, 2)
  ]
  assert list(alone["scores"]) == ["8", "2"]
  assert alone["tensor_bytes"] == sum(e["tensor_bytes"] for e in exports)
  assert alone["bytes_at"] == {
    "8": exports[0]["bytes_at"]["8"],
    "2": exports[1]["bytes_at"]["2"],
  }
  whole = results["rows"]["float"]
  assert whole["bytes_at"] == {"float": whole["tensor_bytes"]}
  assert whole["tensor_bytes"] == exports[0]["float_bytes"]
  joint = results["rows"]["joint"]
  assert joint["tensor_bytes"] == joint["bytes_at"]["8"]


@pytest.mark.slow
def test_means_and_deviations_are_those_of_the_seeds(finished):
  workdir, results = finished
  seen = [
    json.loads(
      (
        workdir / f"seed{seed}" / "double_rounding" / "export" / "result.json"
      ).read_text()
    )["scores"]["2"]["accuracy"]
    for seed in (0, 1)
  ]
  accuracy = results["rows"]["joint"]["scores"]["2"]["accuracy"]
  assert accuracy["seeds"] == seen
  assert accuracy["mean"] == pytest.approx(sum(seen) / 2)
  # Of two numbers: half their difference times the root of two.
  assert accuracy["std"] == pytest.approx(abs(seen[0] - seen[1]) / 2**0.5)


@pytest.mark.slow
def test_the_table_is_written_and_a_second_run_repeats_nothing(finished):
  workdir, results = finished
  written = json.loads((workdir / "compare.json").read_text())
  assert written["rows"] == results["rows"]
  lines = (workdir / "compare.md").read_text().splitlines()
  assert len(lines) == 2 + len(results["rows"])
  assert lines[0].startswith("| method | float | 8 bits | 2 bits |")
  page = (workdir / "report" / "index.html").read_text()
  assert page == report.page_of(workdir) and 'id="methods"' in page
  metrics = workdir / "seed0" / "double_rounding" / "metrics.jsonl"
  before = metrics.read_text(), metrics.stat().st_mtime_ns
  again = comparison.run(comparison.from_values(VALUES), workdir)
  assert again["rows"] == results["rows"]
  assert (metrics.read_text(), metrics.stat().st_mtime_ns) == before
  assert report.comparison_table(again).row_count == len(again["rows"])


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (changed(), "methods must be {name: fields}"),
    ({**VALUES, "methods": ("lsq",)}, "methods must be {name: fields}"),
    ({**VALUES, "seeds": (1, 1)}, r"seeds must be different .* got \(1, 1\)"),
    ({**VALUES, "seeds": (-1,)}, r"seeds must be different .* got \(-1,\)"),
    ({**VALUES, "seeds": 3}, "seeds must be different integers >= 0, got 3"),
    (changed(a=None), "methods.a must be a group of fields, got None"),
    (
      changed(a={"seed": 1}),
      "methods.a.seed is not a field; .* row, method, quant",
    ),
    (changed(a={"row": 5}), "methods.a.row must be a name other than .* got 5"),
    (changed(float={}), "methods.float must be a name other than 'float'"),
    (changed(**{"../a": {}}), "methods.../a must be a name .* got '../a'"),
    (
      changed(a={"row": "x"}, b={"row": "x", "quant": {"bits": (2,)}}),
      "methods.b: row 'x' has one of its bit-widths already",
    ),
    (
      changed(a={"train": {"vectorize": "vmap"}}),
      "methods.a: train.vectorize must not be 'vmap'",
    ),
    (changed(a={"method": "x"}), "methods.a: method must be one of .* got 'x'"),
    (
      changed(a={"method": "binary"}),
      r"methods\.a: quant\.bits of.*got \(8, 2\)",
    ),
    (
      changed(a={"quant": {"bit": 1}}),
      r"methods\.a: quant\.bit is not a field; it must be",
    ),
  ],
)
def test_an_error_names_method_and_field(values, message):
  with pytest.raises(ConfigError, match=message):
    comparison.from_values(values)


def test_every_value_of_its_own_fields_is_accepted_or_one_line():
  accepted = cases = 0
  for value in (*unusual.VALUES, *unusual.UNUSUAL):
    tried = [{"seeds": value}, {"seeds": (value,)}, {"methods": value}]
    tried += [{"methods": {"a": value}}, {"methods": {"a": {"row": value}}}]
    if isinstance(value, int | float | str):
      tried.append({"methods": {value: {}}})
    for changes in tried:
      cases += 1
      try:
        comparison.from_values({"methods": {"a": {}}, **changes})
        accepted += 1
      except ConfigError as error:
        assert "\n" not in str(error) and " must " in str(error), error
  assert cases > 600 and 20 < accepted < 60
