"""Tests of the stage hessian: traces, saved for one float network."""

import json
import shutil

import numpy as np
import pytest
from mixed_job import config

from dr_jax import deploy, hessian, pipeline
from dr_jax.config import ConfigError


def test_every_layer_has_a_trace_with_its_standard_error(finished):
  workdir, summary = finished
  estimates = hessian.load(workdir / "hessian" / "traces.json")
  assert all(e.probes == 8 and e.stderr > 0 for e in estimates.values())
  layers = list(estimates)
  manifest = deploy.open(workdir / "export" / "model").manifest
  assert layers == [layer["name"] for layer in manifest["layers"]]
  result = summary["stages"]["hessian"]
  size = int(np.prod(manifest["layers"][0]["shape"]))
  assert result["sensitivity"][layers[0]] == pytest.approx(
    estimates[layers[0]].mean / size
  )


def test_traces_above_the_wanted_error_are_named_in_a_warning(copied):
  before = (copied / "hessian" / "traces.json").read_text()
  shutil.rmtree(copied / "hessian")
  with pytest.warns(UserWarning, match=r"after max_probes=8 .* stage1/block0"):
    pipeline.run(config(), copied)
  assert (copied / "hessian" / "traces.json").read_text() == before


def test_traces_of_another_network_raise_an_error(copied):
  for part in ("supernet/result.json", "search/result.json"):
    (copied / part).unlink()
  path = copied / "hessian" / "traces.json"
  content = json.loads(path.read_text())
  content["fingerprint"] = "0" * 64
  path.write_text(json.dumps(content))
  with pytest.raises(
    ValueError, match=r"traces\.json must have traces of this"
  ):
    pipeline.run(config(), copied)


def test_traces_that_lack_a_layer_raise_an_error(copied):
  (copied / "search" / "result.json").unlink()
  path = copied / "hessian" / "traces.json"
  content = json.loads(path.read_text())
  content["traces"].pop("stage1/block0/conv1")
  path.write_text(json.dumps(content))
  with pytest.raises(
    ConfigError, match=r"traces\.json must have traces of layers"
  ):
    pipeline.run(config(), copied)
