"""Tests of the stage export: the artifact and the allocations with it."""

import json

import pytest
from mixed_job import STRATEGIES, config, found

from dr_jax import allocate, deploy, pipeline


def test_every_allocation_found_is_a_file_that_the_artifact_loads(finished):
  workdir, summary = finished
  path = workdir / "export"
  export = summary["stages"]["export"]
  names = [
    f"{strategy}_{budget}" for budget in (3, 5) for strategy in STRATEGIES
  ]
  assert list(export["allocations"]) == names
  assert sorted(p.stem for p in (path / "allocations").iterdir()) == sorted(
    names
  )
  allocation = allocate.Allocation.load(path / "allocations" / "uniform_5.json")
  assert set(allocation.values()) == {4}
  assert export["allocation_bytes"]["uniform_5"] == export["bytes_at"]["4"]
  assert deploy.load(path / "model", bits=allocation) is not None


def test_an_artifact_with_other_scores_than_the_search_raises_an_error(copied):
  (copied / "export" / "result.json").unlink()
  path = copied / "search" / "result.json"
  result = json.loads(path.read_text())
  result["rows"][1]["test"]["loss"] += 1e-6
  path.write_text(json.dumps(result))
  with pytest.raises(
    deploy.ArtifactError, match="uniform_3, but in the search"
  ):
    pipeline.run(config(), copied)


@pytest.mark.slow
def test_the_export_is_repeated_after_another_search_at_the_same_budget(copied):
  layers = list(found(copied)[0]["allocation"])
  search = {"strategies": ("uniform",), "budgets": (8,)}
  file = copied / "export" / "allocations" / "uniform_8.json"
  for pinned in ({}, {layers[0]: 2}):
    pipeline.run(config(search={**search, "pinned": pinned}), copied)
    (row,) = found(copied)
    assert dict(allocate.Allocation.load(file)) == row["allocation"]
    result = json.loads((copied / "export" / "result.json").read_text())
    assert result["allocations"] == {"uniform_8": row["allocation"]}
  assert row["allocation"][layers[0]] == 2


def test_allocations_of_an_earlier_search_are_removed(copied):
  search = {"strategies": ("uniform",), "budgets": (6,)}
  pipeline.run(config(search=search), copied)
  (file,) = (copied / "export" / "allocations").iterdir()
  assert file.name == "uniform_6.json"
