"""Tests of the stage search: its problem, results, resumption and errors."""

import itertools
import json
import shutil

import numpy as np
import pytest
from mixed_job import BITS, STRATEGIES, config, found, trials_of

from dr_jax import allocate, deploy, hessian, pipeline
from dr_jax.config import ConfigError
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages import STAGES
from dr_jax.pipeline.stages.search import _study
from dr_jax.pipeline.stages.supernet import supernet
from dr_jax.train import InterruptedRun


def searched(workdir, **search):
  """Runs the stage search alone; returns its rows."""
  run = RunContext(config(search=search), workdir)
  if not STAGES["search"].done(run):
    STAGES["search"].run(run)
  return found(workdir)


def test_sensitivity_is_the_trace_per_parameter_times_the_error(finished):
  workdir, _ = finished
  run = RunContext(config(), workdir)
  study = _study(run)
  sensitivity = study.inputs["sensitivity"]
  traces = hessian.load(workdir / "hessian" / "traces.json")
  network = supernet(run)
  for number, row in enumerate(study.problem.table):
    mean = max(traces[row.name].mean, 0) / row.parameters
    np.testing.assert_allclose(
      sensitivity["bits"][number], [-mean * b for b in BITS]
    )
    block = network
    for part in row.name.split("/"):
      block = getattr(block, part)
    scale = {"scale": block.weight_params["scale"][...]}
    kernel = block.kernel[...]
    errors = [
      np.square(
        np.asarray(
          block.weight_quantizer.fake_quantize(scale, kernel, i) - kernel,
          np.float64,
        )
      ).sum()
      for i in range(len(BITS))
    ]
    np.testing.assert_allclose(
      sensitivity["error"][number], mean * np.array(errors), rtol=1e-6
    )
  row = found(workdir)[0]
  allocation = allocate.Allocation(row["allocation"])
  assert study.score_on_test(allocation)._asdict() == row["test"]


def test_searches_keep_every_budget_and_name_every_layer(finished):
  workdir, _ = finished
  rows = found(workdir)
  assert [(r["budget"], r["strategy"]) for r in rows] == list(
    itertools.product((3.0, 5), STRATEGIES)
  )
  manifest = deploy.open(workdir / "export" / "model").manifest
  parameters = {
    layer["name"]: int(np.prod(layer["shape"])) for layer in manifest["layers"]
  }
  for row in rows:
    assert set(row["allocation"]) == set(parameters)
    stored = sum(parameters[n] * b for n, b in row["allocation"].items())
    assert stored == row["cost"]["stored_bits"] <= row["budgets"]["stored_bits"]
    # A budget of m bits is what m bits everywhere would store.
    assert row["budgets"]["stored_bits"] == row["budget"] * sum(
      parameters.values()
    )
  uniform = [r for r in rows if r["strategy"] == "uniform"]
  assert [set(r["allocation"].values()) for r in uniform] == [{2}, {4}]


@pytest.mark.slow
def test_other_searches_in_the_same_directory_train_nothing(
  finished, copied, monkeypatch
):
  monkeypatch.setattr(hessian, "trace", None)
  other = config(
    search={"strategies": ("uniform", "proportional"), "budgets": (6,)}
  )
  trials = trials_of(copied).read_text()
  pipeline.run(other, copied)
  rows = found(copied)
  assert [r["strategy"] for r in rows] == ["uniform", "proportional"]
  assert trials_of(copied).read_text().startswith(trials)
  assert (copied / "export" / "allocations" / "uniform_6.json").exists()
  # And back: what was found before is still there.
  pipeline.run(config(), copied)
  assert found(copied) == found(finished[0])


@pytest.mark.slow
def test_every_split_gives_a_search_its_own_scores(copied):
  loss = {}
  for split in ("held_out", "train", "both"):
    (row,) = searched(
      copied, strategies=("uniform",), budgets=(5,), eval_split=split
    )
    loss[split] = row["eval"]["loss"]
    assert trials_of(copied, split).exists()
  run = RunContext(config(), copied)
  train, held_out = len(run.data.train), len(run.held_out)
  assert loss["both"] == pytest.approx(
    (train * loss["train"] + held_out * loss["held_out"]) / (train + held_out),
    rel=1e-5,  # float32 sums of a batch
  )
  assert loss["train"] != pytest.approx(loss["held_out"], rel=1e-3)


@pytest.mark.slow
def test_options_and_metric_give_a_search_its_own_result(copied):
  greedy = {"strategies": ("greedy",), "budgets": (5,)}
  files = set()
  for changes in (
    {},
    {"options": {"greedy": {"per_cost": True}}},
    {"metric": "accuracy"},
  ):
    searched(copied, **greedy, **changes)
    before = len(files)
    files |= set((copied / "search" / "found").glob("greedy_5_*"))
    assert len(files) == before + 1


def test_pins_ties_and_several_costs_hold_in_what_is_found(copied):
  layers = list(found(copied)[0]["allocation"])
  changes = {
    "costs": ("stored_bits", "bops"),
    "budgets": (6,),
    "pinned": {layers[0]: 8},
    "ties": ((layers[1], layers[2]),),
  }
  pipeline.run(config(search=changes), copied)
  for row in found(copied):
    allocation = row["allocation"]
    assert allocation[layers[0]] == 8
    assert allocation[layers[1]] == allocation[layers[2]]
    assert all(
      row["cost"][name] <= limit for name, limit in row["budgets"].items()
    )


def latencies(layers, fast):
  """A latency table in which one layer alone gains from fewer bits."""
  return json.dumps(
    {
      name: {b: (b if name == layers[fast] else 1) * 1e-3 for b in BITS}
      for name in layers
    }
  )


@pytest.mark.slow
def test_another_latency_table_in_the_same_file_is_another_search(
  copied, tmp_path
):
  table = tmp_path / "table.json"
  layers = list(found(copied)[0]["allocation"])
  search = {
    "strategies": ("hessian_ilp",),
    "budgets": (2.5,),
    "costs": ("latency",),
    "latency": str(table),
    "options": {"hessian_ilp": {"max_candidates": 1}},
  }
  for fast in (0, -1):
    table.write_text(latencies(layers, fast))
    (row,) = searched(copied, **search)
    assert row["allocation"][layers[fast]] == 2
    assert row["allocation"][layers[-1 - fast]] == 8
  table.write_text('{"stage1/block0/conv1": {"8": 1}}')
  with pytest.raises(ConfigError, match=r"search\.latency='.*table\.json': "):
    searched(copied, **search)


def test_a_measured_table_of_a_network_is_a_cost(copied, tmp_path):
  layers = list(found(copied)[0]["allocation"])
  rows = json.loads(latencies(layers, 0))
  table = allocate.LatencyTable(
    network={b: 1000.0 for b in BITS},
    layers={
      name: {int(b): 1000 * seconds for b, seconds in row.items()}
      for name, row in rows.items()
    },
    measured={"device": "cpu"},
  )
  table.save(tmp_path / "latency.json")
  (row,) = searched(
    copied,
    strategies=("hessian_ilp",),
    budgets=(2.5,),
    costs=("latency",),
    latency=str(tmp_path / "latency.json"),
    options={"hessian_ilp": {"max_candidates": 1}},
  )
  # Nanoseconds: 2.5 bits of the one layer that gains, one of each other.
  assert row["budgets"] == {"latency": (2500 + 1000 * (len(layers) - 1)) * 1000}
  assert row["cost"]["latency"] <= row["budgets"]["latency"]
  assert row["allocation"][layers[0]] == 2
  assert row["allocation"][layers[-1]] == 8


@pytest.mark.slow
def test_a_search_stopped_by_a_signal_resumes_to_the_same_result(
  finished, copied
):
  shutil.rmtree(copied / "search")
  shutil.rmtree(copied / "export")
  calls = itertools.count()
  with pytest.raises(InterruptedRun, match="search: stopped by SIGTERM"):
    pipeline.run(
      config(),
      copied,
      interrupted=lambda: "SIGTERM" if next(calls) > 6 else None,
    )
  kept = len(trials_of(copied).read_text().splitlines())
  assert kept > 0
  pipeline.run(config(), copied)

  def essence(rows):
    keys = ("strategy", "allocation", "test", "eval", "evaluations")
    return [{key: row[key] for key in keys} for row in rows]

  assert essence(found(copied)) == essence(found(finished[0]))
  trials = trials_of(copied).read_text().splitlines()
  indices = [json.loads(line)[0] for line in trials]
  assert len(indices) == len({tuple(i) for i in indices})


@pytest.mark.slow
def test_another_supernet_in_the_same_directory_is_searched_again(
  finished, copied
):
  # Scores that only another network can have had.
  path = trials_of(copied)
  fake = [
    [json.loads(line)[0], 99.0, 0.001, 0.0]
    for line in path.read_text().splitlines()
  ]
  path.unlink()
  other = path.with_name("trials_held_out_00000000.jsonl")
  other.write_text("".join(json.dumps(trial) + "\n" for trial in fake))
  for name in ("supernet", "search"):
    result = copied / name / "result.json"
    content = json.loads(result.read_text())
    if name == "supernet":
      content["network"] = "f" * 64
    result.write_text(json.dumps(content))
  pipeline.run(config(), copied)
  for row, before in zip(found(copied), found(finished[0]), strict=True):
    assert row["eval"] == before["eval"]
  files = list((copied / "search" / "found").iterdir())
  assert len(files) == 2 * len(found(copied))


def test_a_damaged_result_of_a_search_is_named_in_the_error(copied):
  result = copied / "search" / "result.json"
  result.write_text("{}")
  with pytest.raises(ConfigError, match=r"result\.json is damaged"):
    pipeline.run(config(), copied)
  result.unlink()
  broken = next((copied / "search" / "found").iterdir())
  broken.write_text("{")
  with pytest.raises(ConfigError, match=rf"{broken.name} is damaged"):
    pipeline.run(config(), copied)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"budgets": (1.5,)},
      r"search\.budgets=1\.5: budgets\['stored_bits'\]=715 is",
    ),
    ({"pinned": {"conv9": 8}}, r"search\.pinned must be of the.*got 'conv9'"),
    ({"pinned": {"stage1/block0/conv1": 3}}, "conv1 must be one of .* got 3"),
    ({"ties": (("a", "b"),)}, r"search\.ties must be of .* got 'a'"),
    ({"latency": "absent.json"}, r"search\.latency='absent.*No such file"),
    ({"latency": __file__}, r"search\.latency must be .* damaged"),
    (
      {"options": {"uniform": {"speed": 3}}},
      r"search\.options\.uniform must.*got 'speed'",
    ),
    (
      {"options": {"greedy": {"seed": 3}}},
      r"search\.options\.greedy must.*got 'seed'",
    ),
  ],
)
def test_what_does_not_fit_the_network_raises_before_training(
  tmp_path, changes, message
):
  workdir = tmp_path / "run"
  with pytest.raises(ConfigError, match=message) as caught:
    pipeline.run(config(search=changes), workdir)
  assert "\n" not in str(caught.value)
  assert not workdir.exists()


def test_a_budget_that_pins_make_infeasible_raises_before_training(tmp_path):
  changes = {"budgets": (2,), "pinned": {"stage3/block0/conv2": 8}}
  with pytest.raises(
    ConfigError,
    match=r"search\.budgets=2: .*stored_bits.*feasible is .* >= ",
  ):
    pipeline.run(config(search=changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layer", ["stem", "head"])
def test_a_layer_that_stays_float_cannot_be_pinned(tmp_path, layer):
  with pytest.raises(
    ConfigError, match=rf"must be of the quantized layers .* got '{layer}'"
  ):
    pipeline.run(config(search={"pinned": {layer: 8}}), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"genetic": {"probability": "x"}},
      "options.genetic.probability must be in .*got 'x'",
    ),
    (
      {"hessian_ilp": {"objective": ["error"]}},
      r"options.hessian_ilp.objective must be .*got \['error'\]",
    ),
    (
      {"greedy": {"per_cost": True}},
      "per_cost must be False with several search.costs",
    ),
  ],
)
def test_an_option_of_a_wrong_type_names_the_search(copied, options, message):
  search = {
    "strategies": tuple(options),
    "budgets": (6,),
    "costs": ("stored_bits", "bops"),
    "options": options,
  }
  with pytest.raises(ConfigError, match=message) as caught:
    pipeline.run(config(search=search), copied)
  assert "\n" not in str(caught.value)
