"""Tests of the stages hessian, supernet and search, on the smallest job."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from dr_jax import allocate, deploy, hessian, models, nn, pipeline, quant, train
from dr_jax.checkpoint.checkpoints import CheckpointError, Checkpoints
from dr_jax.config import ConfigError, from_dict
from dr_jax.pipeline import training
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.pipeline import check_stages
from dr_jax.pipeline.stages.search import _problem
from dr_jax.pipeline.stages.supernet import supernet
from dr_jax.pipeline.workdir import Workdir
from dr_jax.train import InterruptedRun

BITS = (8, 4, 2)
STRATEGIES = ("hessian_ilp", "uniform", "greedy")


@pytest.fixture(autouse=True)
def strict_numerics():
  """Training runs as users run it."""
  yield


def values(**changes):
  base = {
    "stages": (
      "pretrain",
      "multi_precision",
      "hessian",
      "supernet",
      "search",
      "export",
      "report",
    ),  # fmt: skip
    "data": {"holdout": 0.2},
    "model": {"name": "resnet", "options": {"depth": 8, "widths": (2, 3, 4)}},
    "quant": {"bits": BITS},
    "devices": {"data": 1},
    "pretrain": {"epochs": 2, "optimizer": "sgd", "learning_rate": 0.1},
    "train": {"epochs": 1, "vectorize": "sequential"},
    "hessian": {"images": 256, "batch_size": 128, "max_probes": 8},
    "supernet": {"epochs": 2, "vectorize": "sequential", "alrs": "eta"},
    "search": {"strategies": STRATEGIES, "budgets": (3.0, 5)},
  }
  for field, value in changes.items():
    if isinstance(value, dict) and field in base:
      value = {**base[field], **value}
    base[field] = value
  return base


def config(**changes):
  return from_dict(values(**changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("mixed") / "run"
  return workdir, pipeline.run(config(), workdir)


def found(workdir):
  return json.loads((workdir / "search" / "result.json").read_text())["rows"]


def trials_of(workdir, split="held_out"):
  (path,) = (workdir / "search").glob(f"trials_{split}_*.jsonl")
  return path


def test_every_layer_has_a_trace_with_its_error_bar(finished):
  workdir, summary = finished
  estimates = hessian.load(workdir / "hessian" / "traces.json")
  assert all(e.probes == 8 and e.stderr > 0 for e in estimates.values())
  layers = [name for name in estimates]
  manifest = deploy.open(workdir / "export" / "model").manifest
  assert layers == [layer["name"] for layer in manifest["layers"]]
  result = summary["stages"]["hessian"]
  size = int(np.prod(manifest["layers"][0]["shape"]))
  assert result["sensitivity"][layers[0]] == pytest.approx(
    estimates[layers[0]].mean / size
  )


def test_searches_minimise_traces_per_parameter_times_errors(finished):
  workdir, _ = finished
  run = RunContext(config(), workdir)
  problem, score_on_test = _problem(run)
  traces = hessian.load(workdir / "hessian" / "traces.json")
  network = supernet(run)
  for number, row in enumerate(problem.table):
    mean = max(traces[row.name].mean, 0) / row.parameters
    np.testing.assert_allclose(
      problem.sensitivity["bits"][number], [-mean * b for b in BITS]
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
      problem.sensitivity["error"][number], mean * np.array(errors), rtol=1e-6
    )
  row = found(workdir)[0]
  allocation = allocate.Allocation(row["allocation"])
  assert score_on_test(allocation)._asdict() == row["test"]


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


def test_the_artifact_scores_as_the_search_said_and_so_do_its_files(finished):
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
  loaded = deploy.load(path / "model", bits=allocation)
  assert loaded is not None


def test_an_artifact_that_scores_otherwise_than_the_search_is_an_error(
  finished, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  (workdir / "export" / "result.json").unlink()
  path = workdir / "search" / "result.json"
  result = json.loads(path.read_text())
  result["rows"][1]["test"]["loss"] += 1e-6
  path.write_text(json.dumps(result))
  with pytest.raises(
    deploy.ArtifactError, match="uniform_3, but in the search"
  ):
    pipeline.run(config(), workdir)


def test_the_report_has_a_plot_and_the_same_as_json(finished):
  workdir, _ = finished
  assert (workdir / "report" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
  points = json.loads((workdir / "search" / "pareto.json").read_text())
  assert set(points["points"]) == set(STRATEGIES)


def test_a_finished_run_repeats_nothing(finished, monkeypatch):
  workdir, summary = finished

  def never(*args, **kwargs):
    raise AssertionError("trained or estimated again")

  monkeypatch.setattr(hessian, "trace", never)
  monkeypatch.setattr(training, "train_phase", never)
  assert pipeline.run(config(), workdir) == summary


def test_other_searches_in_the_same_directory_train_nothing(
  finished, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  monkeypatch.setattr(hessian, "trace", None)
  other = config(
    search={"strategies": ("uniform", "proportional"), "budgets": (6,)}
  )
  trials = trials_of(workdir).read_text()
  pipeline.run(other, workdir)
  rows = found(workdir)
  assert [r["strategy"] for r in rows] == ["uniform", "proportional"]
  assert trials_of(workdir).read_text().startswith(trials)
  assert (workdir / "export" / "allocations" / "uniform_6.json").exists()
  # And back: what was found before is still there.
  pipeline.run(config(), workdir)
  assert found(workdir) == found(finished[0])


def test_the_export_follows_a_search_at_the_same_budget(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  layers = list(found(workdir)[0]["allocation"])
  search = {"strategies": ("uniform",), "budgets": (8,)}
  file = workdir / "export" / "allocations" / "uniform_8.json"
  for pinned in ({}, {layers[0]: 2}):
    pipeline.run(config(search={**search, "pinned": pinned}), workdir)
    (row,) = found(workdir)
    assert dict(allocate.Allocation.load(file)) == row["allocation"]
    result = json.loads((workdir / "export" / "result.json").read_text())
    assert result["allocations"] == {"uniform_8": row["allocation"]}
  assert row["allocation"][layers[0]] == 2


def test_all_that_decides_a_search_gives_it_a_result_of_its_own(
  finished, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  judged = {}
  for split in ("held_out", "train", "both"):
    search = {"strategies": ("uniform",), "budgets": (5,), "eval_split": split}
    pipeline.run(config(search=search), workdir)
    (row,) = found(workdir)
    judged[split] = row["judged"]["loss"]
    assert trials_of(workdir, split).exists()
  run = RunContext(config(), workdir)
  train, held_out = len(run.data.train), len(run.held_out)
  assert judged["both"] == pytest.approx(
    (train * judged["train"] + held_out * judged["held_out"])
    / (train + held_out),
    rel=1e-5,  # float32 sums of a batch
  )
  assert judged["train"] != pytest.approx(judged["held_out"], rel=1e-3)
  greedy = {"strategies": ("greedy",), "budgets": (5,)}
  files = set()
  for changes in ({}, {"options": {"greedy": {"per_cost": True}}},
                  {"metric": "accuracy"}):  # fmt: skip
    pipeline.run(config(search={**greedy, **changes}), workdir)
    before = len(files)
    files |= set((workdir / "search" / "found").glob("greedy_5_*"))
    assert len(files) == max(before + 1, 1)


def test_the_supernet_is_told_its_sigma_and_warmup(monkeypatch, tmp_path):
  told = {}

  class Told(Exception):
    pass

  def sampling(sensitivity, bits, **options):
    told.update(options, sensitivity=sensitivity, bits=bits)
    raise Told

  monkeypatch.setattr(train.hasb, "sampling", sampling)
  with pytest.raises(Told):
    pipeline.run(config(hasb={"sigma": 0.25, "warmup": 0.5}), tmp_path / "run")
  result = json.loads((tmp_path / "run/hessian/result.json").read_text())
  assert told == {
    "sensitivity": list(result["sensitivity"].values()),
    "bits": BITS,
    "steps": 2 * 1006 // 128,
    "epochs": 2,
    "start": 0.25,
    "warmup": 0.5,
  }


def test_a_search_stopped_by_a_signal_goes_on_to_the_same_result(
  finished, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  shutil.rmtree(workdir / "search")
  shutil.rmtree(workdir / "export")
  calls = itertools.count()
  with pytest.raises(InterruptedRun, match="search: stopped by SIGTERM"):
    pipeline.run(
      config(),
      workdir,
      interrupted=lambda: "SIGTERM" if next(calls) > 6 else None,
    )
  kept = len(trials_of(workdir).read_text().splitlines())
  assert kept > 0
  pipeline.run(config(), workdir)

  def essence(rows):
    keys = ("strategy", "allocation", "test", "judged", "evaluations")
    return [{key: row[key] for key in keys} for row in rows]

  assert essence(found(workdir)) == essence(found(finished[0]))
  trials = trials_of(workdir).read_text().splitlines()
  indices = [json.loads(line)[0] for line in trials]
  assert len(indices) == len({tuple(i) for i in indices})


def test_traces_of_another_network_are_refused(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  for part in ("supernet/result.json", "search/result.json"):
    (workdir / part).unlink()
  path = workdir / "hessian" / "traces.json"
  content = json.loads(path.read_text())
  content["fingerprint"] = "0" * 64
  path.write_text(json.dumps(content))
  with pytest.raises(
    ValueError, match=r"traces\.json must have traces of this"
  ):
    pipeline.run(config(), workdir)


def test_a_supernet_of_other_candidate_bits_is_refused(finished):
  workdir, _ = finished
  with pytest.raises(ConfigError, match=r"quant\.bits is \[8, 4, 2\] there"):
    pipeline.run(config(quant={"bits": (8, 2)}), workdir)


def test_a_supernet_checkpoint_does_not_fit_other_candidate_bits(finished):
  workdir, _ = finished
  bits = (8, 4)
  network = nn.functional(
    nn.quantize(
      models.build(
        "resnet",
        depth=8,
        widths=(2, 3, 4),
        num_classes=10,
        channels=1,
        rngs=nnx.Rngs(0),
      ),
      weight=quant.double_rounding(bits),
      activation=quant.lsq_activation(bits),
      sample=np.ones((2, 8, 8, 1), np.float32),
      norm="transitional",
    )
  )
  optimizer = train.make_optimizer("adam", param_labels=network.param_labels)
  trainer = train.make_trainer(network, optimizer, lambda step: 0.0)
  state = trainer.init(jax.random.key(0))
  directory = workdir / "supernet" / "checkpoints"
  with Checkpoints(directory) as checkpoints:
    with pytest.raises(
      CheckpointError,
      match=r"another state: .*float32\[9, \d\], not float32\[4, ",
    ):
      checkpoints.restore(like=state)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"search": {"budgets": (0,)}}, r"search\.budgets must be > 0, got 0"),
    (
      {"search": {"budgets": (3, -1.0)}},
      r"search\.budgets must be > 0, got -1\.0",
    ),
    ({"search": {"budgets": ()}}, r"search\.budgets must not be empty"),
    (
      {"search": {"budgets": ("3",)}},
      r"search\.budgets must be a tuple of",
    ),
    (
      {"search": {"budgets": (True,)}},
      r"search\.budgets must be a tuple of",
    ),
    (
      {"search": {"budgets": (float("inf"),)}},
      r"search\.budgets must be finite, got inf",
    ),
    (
      {"search": {"strategies": ("best",)}},
      r"strategies must be one of .*greedy.* got 'best'",
    ),
    (
      {"search": {"costs": ("bytes",)}},
      r"costs must be one of stored_bits.* got 'bytes'",
    ),
    ({"search": {"costs": ("latency",)}}, r"search\.latency must be .* got ''"),
    (
      {"search": {"eval_split": "test"}},
      r"search\.eval_split must be one of held_out.* got 'test'",
    ),
    (
      {"search": {"metric": "speed"}},
      r"search\.metric must be one of .* got 'speed'",
    ),
    (
      {"data": {"holdout": 0.0}},
      r"data\.holdout must be > 0 and < 1 .* got 0\.0",
    ),
    (
      {"data": {"holdout": 1.0}},
      r"data\.holdout must be > 0 and < 1 .* got 1\.0",
    ),
    (
      {"hessian": {"rel_stderr": 0.0}},
      r"hessian\.rel_stderr must be > 0, got 0\.0",
    ),
    (
      {"hessian": {"max_probes": 7}},
      r"hessian\.max_probes must be >= .*8, got 7",
    ),
    ({"hasb": {"sigma": 1.5}}, r"hasb\.sigma must be <= 1, got 1\.5"),
    (
      {"supernet": {"loss_weights": (1.0,)}},
      r"supernet\.loss_weights must be.*got \(1\.0,\)",
    ),
    (
      {"supernet": {"sampling": "random"}},
      r"supernet\.sampling must be.*got 'random'",
    ),
    (
      {"quant": {"norm": "shared"}},
      r"quant\.norm must be switchable.*got 'shared'",
    ),
    (
      {"search": {"options": {"greedy": 3}}},
      r"options\.greedy must be a group of options, got 3",
    ),
    (
      {"search": {"options": {"best": {}}}},
      r"search\.options must be .*'best'",
    ),
    (
      {"search": {"ties": ("conv1", "conv2")}},
      r"search\.ties must be a tuple of list or tuple",
    ),
    (
      {"search": {"ties": (3,)}},
      r"search\.ties must be .* got 3",
    ),
    (
      {"search": {"budgets": (3, 3.0)}},
      "budgets must be different, got 3 2 times",
    ),
    (
      {"search": {"strategies": ("greedy",) * 2}},
      "must be different, got greedy 2 times",
    ),
    ({"stages": ("pretrain", "search")}, "search must come after supernet"),
    (
      {"stages": ("multi_precision", "hessian")},
      "hessian must come after pretrain",
    ),
    (
      {"stages": ("pretrain", "multi_precision", "supernet", "hessian")},
      "supernet must come after hessian",
    ),
  ],
)
def test_a_wrong_search_is_an_error_before_anything_runs(changes, message):
  with pytest.raises(ConfigError, match=message):
    check_stages(config(**changes))


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
def test_what_only_the_network_can_tell_is_one_line_before_training(
  tmp_path, changes, message
):
  workdir = tmp_path / "run"
  with pytest.raises(ConfigError, match=message) as caught:
    pipeline.run(config(search=changes), workdir)
  assert "\n" not in str(caught.value)
  assert not workdir.exists()


def test_a_budget_that_pins_make_infeasible_is_told_before_training(tmp_path):
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
      "search: genetic with options.*got 'x'",
    ),
    (
      {"hessian_ilp": {"objective": ["error"]}},
      r"search: hessian_ilp with.*got \['error'\]",
    ),
    (
      {"greedy": {"per_cost": True}},
      "budgets must be a single one with per_cost",
    ),
  ],
)
def test_an_option_of_a_wrong_kind_names_the_search(
  finished, tmp_path, options, message
):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  search = {
    "strategies": tuple(options),
    "budgets": (6,),
    "costs": ("stored_bits", "bops"),
    "options": options,
  }
  with pytest.raises(ConfigError, match=message) as caught:
    pipeline.run(config(search=search), workdir)
  assert "\n" not in str(caught.value)


def latencies(workdir, fast):
  """A latency table in which one layer alone gains from fewer bits."""
  layers = list(found(workdir)[0]["allocation"])
  return json.dumps(
    {
      name: {b: (b if name == layers[fast] else 1) * 1e-3 for b in BITS}
      for name in layers
    }
  )


def test_another_latency_table_in_the_same_file_is_another_search(
  finished, tmp_path
):
  workdir, table = tmp_path / "run", tmp_path / "table.json"
  shutil.copytree(finished[0], workdir)
  layers = list(found(workdir)[0]["allocation"])
  search = {
    "strategies": ("hessian_ilp",),
    "budgets": (2.5,),
    "costs": ("latency",),
    "latency": str(table),
    "options": {"hessian_ilp": {"max_candidates": 1}},
  }
  for fast in (0, -1):
    table.write_text(latencies(finished[0], fast))
    pipeline.run(config(search=search), workdir)
    (row,) = found(workdir)
    assert row["allocation"][layers[fast]] == 2
    assert row["allocation"][layers[-1 - fast]] == 8
  table.write_text('{"stage1/block0/conv1": {"8": 1}}')
  with pytest.raises(ConfigError, match=r"search\.latency='.*table\.json': "):
    pipeline.run(config(search=search), workdir)


def test_a_supernet_trained_anew_is_searched_anew(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  # Scores that only another network can have had.
  path = trials_of(workdir)
  fake = [[json.loads(line)[0], 99.0, 0.001, 0.0] for line in path.open()]
  path.unlink()
  other = path.with_name("trials_held_out_00000000.jsonl")
  other.write_text("".join(json.dumps(trial) + "\n" for trial in fake))
  for name in ("supernet", "search"):
    result = workdir / name / "result.json"
    content = json.loads(result.read_text())
    if name == "supernet":
      content["network"] = "f" * 64
    result.write_text(json.dumps(content))
  pipeline.run(config(), workdir)
  for row, before in zip(found(workdir), found(finished[0]), strict=True):
    assert row["judged"] == before["judged"]
  files = list((workdir / "search" / "found").iterdir())
  assert len(files) == 2 * len(found(workdir))


def test_copied_checkpoints_of_other_bits_are_refused(finished, tmp_path):
  workdir = tmp_path / "run"
  bits = (8, 5, 2)  # As many, so that every array has the same shape.
  with pytest.raises(InterruptedRun):
    pipeline.run(
      config(quant={"bits": bits}), workdir, interrupted=lambda: "SIGTERM"
    )
  for stage in ("pretrain", "multi_precision"):
    shutil.rmtree(workdir / stage, ignore_errors=True)
    shutil.copytree(finished[0] / stage, workdir / stage)
  (workdir / "multi_precision" / "result.json").unlink()
  with pytest.raises(
    ConfigError,
    match=r"multi_precision/network\.json: .*bits is \[8, 4, 2\] there, \[8, 5",
  ):
    pipeline.run(config(quant={"bits": bits}), workdir)


@pytest.mark.parametrize(
  "name", ["config.json", "supernet/result.json", "hessian/result.json"]
)
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_is_named(finished, tmp_path, name, content):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  (workdir / name).write_text(content)
  with pytest.raises(
    ConfigError, match=rf"{name} is damaged, not a JSON object; "
  ):
    pipeline.run(config(), workdir)


def test_a_damaged_result_of_a_search_is_named(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  (workdir / "search" / "result.json").write_text("{}")
  broken = next((workdir / "search" / "found").iterdir())
  broken.write_text("{")
  with pytest.raises(ConfigError, match=rf"{broken.name} is damaged"):
    pipeline.run(config(), workdir)


def test_traces_that_stay_uncertain_are_named(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  before = (workdir / "hessian" / "traces.json").read_text()
  shutil.rmtree(workdir / "hessian")
  with pytest.warns(UserWarning, match=r"after max_probes=8 .* stage1/block0"):
    pipeline.run(config(), workdir)
  assert (workdir / "hessian" / "traces.json").read_text() == before


def test_traces_that_lack_a_layer_are_refused(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  (workdir / "search" / "result.json").unlink()
  path = workdir / "hessian" / "traces.json"
  content = json.loads(path.read_text())
  content["traces"].pop("stage1/block0/conv1")
  path.write_text(json.dumps(content))
  with pytest.raises(
    ConfigError, match=r"traces\.json must have traces of layers"
  ):
    pipeline.run(config(), workdir)


def test_a_directory_at_work_keeps_its_configuration(tmp_path):
  directory = Workdir(tmp_path / "run")
  with directory.claim(config()):
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ConfigError, match="workdir"):
      pipeline.run(config(search={"budgets": (7,)}), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_allocations_of_an_earlier_search_do_not_stay(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  search = {"strategies": ("uniform",), "budgets": (6,)}
  pipeline.run(config(search=search), workdir)
  (file,) = (workdir / "export" / "allocations").iterdir()
  assert file.name == "uniform_6.json"


def test_pins_ties_and_several_costs_hold_in_what_is_found(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  layers = list(found(workdir)[0]["allocation"])
  changes = {
    "costs": ("stored_bits", "bops"),
    "budgets": (6,),
    "pinned": {layers[0]: 8},
    "ties": ((layers[1], layers[2]),),
  }
  pipeline.run(config(search=changes), workdir)
  for row in found(workdir):
    allocation = row["allocation"]
    assert allocation[layers[0]] == 8
    assert allocation[layers[1]] == allocation[layers[2]]
    assert all(
      row["cost"][name] <= limit for name, limit in row["budgets"].items()
    )


def test_the_search_is_no_part_of_what_a_directory_is_claimed_for(tmp_path):
  directory = Workdir(tmp_path / "run")
  with directory.claim(config()):
    pass
  with directory.claim(config(search={"budgets": (4,)})):
    pass
  stored = json.loads((tmp_path / "run" / "config.json").read_text())
  assert stored["search"]["budgets"] == [4]
  with pytest.raises(ConfigError, match="seed is 0 there, 1 here"):
    with directory.claim(dataclasses.replace(config(), seed=1)):
      pass
