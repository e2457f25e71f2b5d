"""Tests of the work that stages announce, against what a run did."""

import json

import pytest
from mixed_job import BITS, STRATEGIES, config, found

from dr_jax import hessian, nn
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages import STAGES


@pytest.fixture(scope="module")
def work(finished):
  """The work of each stage, and the directory of the run."""
  workdir, _ = finished
  run = RunContext(config(), workdir)
  network = nn.quantize(run.zeros(), weight=run.weight, sample=run.sample[:1])
  table = nn.layer_table(network)
  return workdir, {
    name: STAGES[name].work(run, table) for name in config().stages
  }


def test_probes_are_those_that_were_drawn(work):
  workdir, works = work
  (probes,) = works["hessian"]
  traces = hessian.load(workdir / "hessian" / "traces.json")
  # The least is the most.
  assert {t.probes for t in traces.values()} == {probes.least} == {probes.most}
  assert probes.examples == 256


def test_searches_scored_no_more_than_was_said(work):
  workdir, works = work
  *searches, tests = works["search"]
  rows = found(workdir)
  assert [w.stage for w in searches] == [f"search/{s}" for s in STRATEGIES]
  for strategy, said in zip(STRATEGIES, searches, strict=True):
    scored = [r["evaluations"] for r in rows if r["strategy"] == strategy]
    assert said.least <= sum(scored) <= said.most
    assert said.examples == 251  # A fifth of the training images.
    if strategy == "uniform":
      assert sum(scored) == said.most
  assert tests.most == len(rows)


def test_the_export_was_scored_as_often_as_was_said(work):
  workdir, works = work
  (tests,) = works["export"]
  result = json.loads((workdir / "export" / "result.json").read_text())
  assert tests.most == len(result["scores"]) + len(result["allocations"])
  assert tests.most == len(BITS) + len(found(workdir))
  assert works["report"] == works["pretrain"] == ()
