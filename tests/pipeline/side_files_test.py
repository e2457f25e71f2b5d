"""Files of a run that are read back: damaged in many ways, or links.

Whatever is in them, a run ends with one line that names the file and says what
to do, or with the summary that it had.
"""

import collections
import contextlib
import copy
import dataclasses
import io
import json
import os
import random
import shutil

import pytest
from rich.console import Console

from dr_jax import config, hessian, pipeline, report, search
from dr_jax.allocate import Allocation
from dr_jax.config import ConfigError
from dr_jax.pipeline import training
from dr_jax.pipeline.workdir import Workdir, read_object
from dr_jax.report import comparison, results
from dr_jax.runtime import files, schema
from dr_jax.runtime.metrics import MetricsWriter
from dr_jax.train import Score

VALUES = (
  *(None, True, 0, -1, 2**63, 10**400, 0.5, 1e308, float("nan"), "", "x"),
  *([], [0], [[[]]], {}, {"x": 1}, {"accuracy": "x", "loss": None}),
  *(-(10**400), "../../x", "[red]", "\ud800"),
)


SMALL = config.from_dict(
  {
    "model": {"name": "resnet", "options": {"depth": 8, "widths": (2, 2, 2)}},
    "data": {"name": "synthetic", "image_size": 8, "batch_size": 8},
    "quant": {"bits": (8, 4)},
    "pretrain": {"epochs": 1},
    "train": {"epochs": 1},
  }
)
SCORE = {"accuracy": 90.0, "loss": float("inf")}
SCORES = {"float": SCORE, "8": SCORE, "4": SCORE}
TRAINED = {"scores": SCORES, "train_seconds": 1.5, "network": "0123456789abc"}
ROW = {
  "strategy": "greedy",
  "budget": 6.0,
  "allocation": {"stage1/block0/conv1": 8, "stage1/block0/conv2": 4},
  "cost": {"stored_bits": 100, "bops": 200, "sum_bits": 12},
  "eval": SCORE,
  "test": SCORE,
  "evaluations": 3,
  "seconds": 0.1,
  "evaluation_seconds": 0.2,
}
EXPORTED = {
  "scores": SCORES,
  "allocations": {"greedy_6": ROW["allocation"]},
  "bytes_at": {"8": 100, "4": 50},
  "stored_bytes": 100,
  "tensor_bytes": 90,
  "float_bytes": 400,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Every file that a run reads back, by who writes them."""
  path = tmp_path_factory.mktemp("written") / "run"
  workdir = Workdir(path)
  with workdir.claim(SMALL):
    for stage in ("pretrain", "multi_precision", "supernet", "separate"):
      workdir.finish(stage, 0.0, **TRAINED)
      workdir.record_network(stage, {"bits": [8, 4], "layers": ["a"]})
    workdir.finish("search", 0.0, request={}, rows=[ROW])
    workdir.finish("hessian", 0.0, traces={})
    workdir.finish("export", 0.0, **EXPORTED)
  files.write_json(path / "search" / "found" / "greedy_6.json", ROW)
  estimate = hessian.TraceEstimate(1.5, 0.1, 8)
  estimates = {"a": estimate, "b": estimate}
  hessian.save(path / "hessian" / "traces.json", estimates, fingerprint="f")
  Allocation({"a": 8, "b": 4}).save(path / "export/allocations/greedy_6.json")
  with MetricsWriter(path / "metrics.jsonl") as metrics:
    for step in range(4):
      values = {"loss": float("nan"), "examples_per_second": 100.0}
      metrics.write(
        "pretrain", step, values, bits=(None, 8, "random")[step % 3]
      )
  trials = path / "search" / "trials_held_out.jsonl"
  evaluate = search.Evaluator(lambda index: Score(1.0, 2.0), path=trials)
  for index in ((0, 0), (0, 1), (1, 1)):
    evaluate(index)
  return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run on a few images, to the end."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  pipeline.run(SMALL, workdir)
  return workdir


def places(value, path=()):
  yield path
  if isinstance(value, dict | list):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
      yield from places(inner, (*path, key))


def changed(value, rng):
  """JSON with an entry that is another, missing, or of another name."""
  value = copy.deepcopy(value)
  *path, key = rng.choice(list(places({"all": value}))[1:])
  whole = parent = {"all": value}
  for step in path:
    parent = parent[step]
  match rng.randrange(4):
    case 0:
      del parent[key]
    case 1 if isinstance(parent, dict):
      parent[rng.choice(["x", "scores", ""])] = parent.pop(key)
    case _:
      parent[key] = rng.choice(VALUES)
  return whole.get("all")


def mutant(content, rng):
  """The content of a file of JSON, or of JSON lines, changed somewhere."""
  match rng.randrange(4):
    case 0:
      return content[: rng.randrange(len(content))]
    case 1:
      place = rng.randrange(len(content))
      return (
        content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
      )
    case 2 if b"\n{" in content or b"\n[[" in content:
      lines = content.splitlines()
      line = rng.randrange(len(lines))
      lines[line] = json.dumps(changed(json.loads(lines[line]), rng)).encode()
      return b"\n".join(lines) + b"\n"
  try:
    return json.dumps(changed(json.loads(content), rng)).encode()
  except ValueError:
    return b"[" * rng.choice([10, 100, 100_000])


def read_back(workdir):
  """The files that a run reads, by their path in it."""
  patterns = ("*/result.json", "search/found/*.json", "search/trials*.jsonl")
  patterns += ("config.json", "hessian/traces.json", "metrics.jsonl")
  patterns += ("*/network.json", "export/allocations/*.json")
  found = [path for pattern in patterns for path in workdir.glob(pattern)]
  assert len(found) >= 12
  return sorted(str(path.relative_to(workdir)) for path in found)


def read(workdir, name):
  """Reads a file as the run does."""
  path = workdir / name
  if name == "config.json":
    with Workdir(workdir).claim(SMALL):
      return
  if name.endswith("result.json"):
    Workdir(workdir).result(path.parent.name)
  elif name.endswith("network.json"):
    Workdir(workdir).record_network(path.parent.name, {"bits": [8, 4]})
  elif "trials" in name:
    search.Evaluator(lambda index: Score(1.0, 1.0), path=path)
  elif name == "metrics.jsonl":
    with MetricsWriter(path) as metrics:
      metrics.resume("pretrain", 1)
      metrics.training_seconds("pretrain", examples_per_step=8)
  elif name.endswith("traces.json"):
    hessian.load(path)
  elif "allocations" in name:
    Allocation.load(path)
  else:
    read_object(path, results.ROW)


def attack(original, workdir, count, seed):
  rng, ends = random.Random(seed), collections.Counter()
  names = read_back(original)
  for number in range(count):
    name = names[number % len(names)]
    (workdir / name).parent.mkdir(parents=True, exist_ok=True)
    (workdir / name).write_bytes(mutant((original / name).read_bytes(), rng))
    try:
      read(workdir, name)
    except (ConfigError, ValueError) as error:
      assert type(error) in (ConfigError, ValueError), error
      assert str(workdir) in str(error) and "\n" not in str(error), error
      ends["error"] += 1
    else:
      ends["read"] += 1
  return ends


def test_750_damaged_files_are_read_or_named_in_one_line(written, tmp_path):
  ends = attack(written, tmp_path / "run", 750, seed=0)
  assert sum(ends.values()) == 750 and ends["error"] >= 300


def show(stages):
  """Writes all that a run with these results ends with."""
  file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
  console = Console(file=file, width=160)
  summary = {
    "name": "run",
    "task": "classification",
    "bits": SMALL.quant.bits,
    "stages": stages,
  }
  console.print(report.summary_table(summary))
  console.print(report.search_table(stages["search"]["rows"]))
  report.search_summary(stages["search"]["rows"])
  file.flush()


def test_of_700_damaged_results_what_is_read_can_be_shown():
  rng, ends = random.Random(1), collections.Counter()
  trained = ("pretrain", "multi_precision", "supernet")
  stages = dict.fromkeys((*trained, "separate/8", "separate/4"), TRAINED)
  stages |= {"search": {"request": {}, "rows": [ROW]}, "export": EXPORTED}
  show(stages)
  for number in range(700):
    name = list(stages)[number % len(stages)]
    text = json.dumps(changed(stages[name], rng))
    try:
      value = schema.parse(text)
      schema.check(value, results.schema_of(name, SMALL.quant.bits))
    except ValueError:
      ends["error"] += 1
    else:
      show(stages | {name: value})
      ends["shown"] += 1
  assert ends["shown"] >= 100 and ends["error"] >= 400


@pytest.mark.parametrize(
  ("stage", "change", "message"),
  [
    ("multi_precision", lambda r: r["scores"].pop("4"), "scores must be .*4"),
    ("pretrain", lambda r: r.update(scores={}), "scores must be .*float"),
    ("export", lambda r: r["bytes_at"].pop("8"), "bytes_at must be .*8"),
    ("export", lambda r: r.update(float_bytes=0), "float_bytes must be .*> 0"),
    (
      "search",
      lambda r: r["rows"][0].update(strategy="../../x"),
      r"rows\[0\].strategy must be one of .*greedy",
    ),
  ],
)
def test_a_result_without_what_is_shown_or_with_a_path_is_an_error(
  written, tmp_path, stage, change, message
):
  result = json.loads((written / stage / "result.json").read_bytes())
  change(result)
  files.write_json(tmp_path / stage / "result.json", result)
  with pytest.raises(ConfigError, match=f"{stage}/result.json .*{message}"):
    Workdir(tmp_path, SMALL.quant.bits).result(stage)


@pytest.mark.parametrize("speed", [0, 0.0, -5.0, "NaN", "-Infinity"])
def test_speeds_that_cannot_be_take_no_seconds(tmp_path, speed):
  with MetricsWriter(tmp_path / "metrics.jsonl") as metrics:
    for value in (speed, 100.0):
      metrics.write("train", 10, {"examples_per_second": float(value)})
    metrics.write("other", 10, {"examples_per_second": float(speed)})
    assert metrics.training_seconds("train", examples_per_step=8) == 0.8
    assert metrics.training_seconds("other", examples_per_step=8) == 0


def test_a_figure_is_not_written_through_a_link(tmp_path):
  precious = tmp_path / "precious.txt"
  precious.write_text("all of my work")
  for name in ("pareto.png", "pareto.png.partial"):
    (tmp_path / name).symlink_to(precious)
  report.plot_searches(tmp_path / "pareto.png", [ROW])
  assert precious.read_text() == "all of my work"
  assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_result_ends_a_run_before_it_trains(written, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(written, workdir)
  (workdir / "export" / "result.json").write_text('{"scores": 3}')
  shutil.rmtree(workdir / "pretrain")
  message = "export/result.json is damaged: .*; delete it and run again"
  with pytest.raises(ConfigError, match=message):
    pipeline.run(SMALL, workdir)
  assert not (workdir / "pretrain").exists()


@pytest.mark.slow
def test_a_damaged_log_keeps_no_trained_network_from_its_result(
  finished, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  (workdir / "export" / "result.json").unlink()
  (workdir / "metrics.jsonl").write_text("not of a run\n")
  page = r"index.html: .*metrics.jsonl is damaged: line 1: "
  with pytest.warns(UserWarning, match=page):
    summary = pipeline.run(SMALL, workdir)
  assert summary["stages"]["export"]["scores"]
  # As if it were damaged between the last step and the scores.
  (workdir / "multi_precision" / "result.json").unlink()
  monkeypatch.setattr(training, "MetricsWriter", contextlib.nullcontext)
  with pytest.warns(UserWarning, match="metrics.jsonl is damaged: line 1: "):
    summary = pipeline.run(SMALL, workdir)
  assert summary["stages"]["multi_precision"]["scores"]
  assert (workdir / "metrics.jsonl").read_text() == "not of a run\n"


def test_links_in_a_directory_of_someone_else_destroy_nothing(
  written, tmp_path
):
  precious = tmp_path / "precious.txt"
  for name in ("lock", "config.json.partial", "metrics.jsonl", "trials.jsonl"):
    workdir = tmp_path / f"run-{name}"
    shutil.copytree(written, workdir)
    precious.write_text("all of my work, without an end of line")
    (workdir / name).unlink(missing_ok=True)
    (workdir / name).symlink_to(precious)
    try:
      if name == "trials.jsonl":
        search.Evaluator(lambda index: Score(1, 1), path=workdir / name)
      elif name == "metrics.jsonl":
        MetricsWriter(workdir / name)
      else:
        with Workdir(workdir).claim(dataclasses.replace(SMALL, log_every=7)):
          pass
      assert name == "config.json.partial"
    except (ConfigError, OSError) as error:
      assert name in str(error)
    assert precious.read_text() == "all of my work, without an end of line"


def test_a_file_that_is_not_of_metrics_or_trials_is_not_cut(tmp_path):
  file = tmp_path / "thesis.txt"
  file.write_text("first line\nno end of line")
  for reader in (
    MetricsWriter,
    lambda path: search.Evaluator(lambda index: Score(1, 1), path=path),
  ):
    with pytest.raises(ValueError, match="thesis.txt is damaged: line 1: "):
      reader(file)
    assert file.read_text() == "first line\nno end of line"


def test_a_fifo_is_not_waited_for(tmp_path):
  path = tmp_path / "result.json"
  os.mkfifo(path)
  with pytest.raises(ValueError, match="must be a regular file"):
    files.read_json(path)


@pytest.mark.parametrize("content", ["{}", "[", '{"rows": {"float": {}}}'])
def test_results_of_a_comparison_that_are_damaged_are_named(tmp_path, content):
  path = tmp_path / "compare.json"
  path.write_text(content)
  with pytest.raises(SystemExit, match="compare.json is damaged: "):
    comparison.main([str(path), str(tmp_path / "figure.svg")])
  with pytest.raises(SystemExit, match="usage: "):
    comparison.main([str(path)])
