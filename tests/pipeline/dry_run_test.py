"""Tests of what --dry_run says of a run, and that it leaves nothing."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import pytest
from rich.filesize import decimal

from dr_jax import data, nn, train
from dr_jax.config import ConfigError, from_dict, quantizers
from dr_jax.pipeline import (
  comparison,
  dry_run,
  phases,
  pipeline,
  throughput,
  times,
)
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages import STAGES

MODEL = {"name": "resnet", "options": {"depth": 8, "widths": (4, 6, 8)}}
VALUES = {
  "model": MODEL,
  "data": {"name": "digits", "batch_size": 100, "holdout": 0.2},
  "quant": {"bits": (8, 2)},
  "pretrain": {"epochs": 2, "optimizer": "sgd"},
  "train": {"epochs": 3},
  "supernet": {"epochs": 1},
  "hessian": {"images": 8},
  "search": {"strategies": ("greedy", "edmips"), "budgets": (4.0,)},
  "devices": {"data": 1},
}
EXAMPLES = 1257 - 251
MEASURE = throughput.measure


@pytest.fixture(scope="module", autouse=True)
def empty(tmp_path_factory):
  """An empty place, and a device of a million multiply-accumulates a second."""
  with pytest.MonkeyPatch.context() as patch:
    speed = throughput.Throughput(1e6, 1, 1.0)
    patch.setattr(throughput, "measure", lambda table, **options: speed)
    patch.chdir(tmp_path_factory.mktemp("empty"))
    yield pathlib.Path.cwd()


def macs_of(text):
  (found,) = re.findall(r"([\d,]+) multiply-accumulates an", text)
  return int(found.replace(",", ""))


def cells(text, first):
  """The cells of the lines of tables that begin so."""
  lines = [line for line in text.splitlines() if line.startswith(f"{first}  ")]
  return [re.split(r"  +", line) for line in lines]


@pytest.fixture(scope="module")
def mixed():
  stages = tuple(name for name in STAGES if name != "separate")
  return from_dict(VALUES | {"stages": stages})


@pytest.fixture(scope="module")
def text(mixed):
  return dry_run.describe(mixed, "run")


def test_the_configuration_is_what_the_run_would_store(text, mixed):
  stored = text.split("has it:\n")[1].split("\n\n")[0]
  assert json.loads(stored) == json.loads(json.dumps(dataclasses.asdict(mixed)))


def test_nothing_is_written(text, empty):
  assert text.endswith("in run; nothing was written")
  assert not list(empty.iterdir())


def test_steps_passes_operations_and_time_follow_from_the_recipes(text, mixed):
  macs, quantized = (
    int(count.replace(",", ""))
    for count in re.findall(r"([\d,]+) multiply-accumulates", text)
  )
  # The first and the last layer stay float.
  assert macs == quantized + 64 * 9 * 4 + 8 * 10
  for name, epochs, passes in (
    ("pretrain", 2, 1),
    ("multi_precision", 3, 2),
    ("supernet", 1, 2),
  ):
    steps = epochs * EXAMPLES // 100
    seconds = 3 * macs * steps * 100 * passes / 1e6
    _, row = cells(text, name)
    assert row[:3] == [name, str(steps), str(passes)]
    assert row[3] == f"{2 * seconds * 1e6:.2g}"
    assert row[4] == times.duration(seconds)


def test_work_besides_training_is_counted(text):
  macs = macs_of(text)
  # At 2 bits the seven smallest of eight layers have the budget of 4.
  greedy = 1 + sum(range(2, 9))
  for first, what, least, most, examples, cost in (
    ("hessian", "probes", 8, 512, 8, 6),
    ("search/greedy", "evaluations", 1, greedy, 251, 1),
    ("search/edmips", "steps", 200, 200, 100, 3),
    ("search", "tests", 2, 2, 540, 1),
    ("export", "tests", 4, 4, 540, 1),
  ):
    row = cells(text, first)[0]
    assert row[:2] == [first, what]
    assert row[3] == str(examples)
    assert row[4] == f"{2.0 * cost * macs * examples * most:.2g}"
    seconds = [cost * macs * n * examples / 1e6 for n in (least, most)]
    spans = [(str(least), str(most)), [*map(times.duration, seconds)]]
    for got, (low, high) in zip((row[2], row[5]), spans, strict=True):
      assert got == (low if low == high else f"{low} to {high}")


def test_without_work_besides_training_nothing_is_said_of_it():
  text = dry_run.describe(from_dict(VALUES | {"stages": ("pretrain",)}), "run")
  assert "besides" not in text
  assert "\n\n\n" not in text


def test_activations_are_those_of_the_passes_that_are_at_once(text, mixed):
  run = RunContext(mixed, "run")
  (phase,) = STAGES["multi_precision"].phases(run)
  recipe = dataclasses.replace(
    phase.recipe, schedule="accumulate", vectorize="vmap"
  )
  both = phases.memory(run, phase._replace(recipe=recipe)).activations
  row, _ = cells(text, "multi_precision")
  assert row[4] == decimal(both // 2)
  # More than the inputs of a convolution.
  assert both // 2 > 100 * 8 * 8 * 4 * 4
  devices = dataclasses.replace(mixed.devices, data=2)
  halved = RunContext(dataclasses.replace(mixed, devices=devices), "run")
  assert phases.memory(halved, phase).activations == -(-both // 4)


@pytest.mark.parametrize("stage", ["pretrain", "multi_precision", "supernet"])
def test_the_state_is_the_one_that_would_train(mixed, stage):
  run = RunContext(mixed, "run")
  (phase,) = STAGES[stage].phases(run)
  network = run.model()
  if stage != "pretrain":
    weight, activation = quantizers(mixed.quant)
    norm = "transitional" if stage == "supernet" else "switchable"
    network = nn.quantize(
      network,
      weight=weight,
      activation=activation,
      sample=run.sample,
      norm=norm,
    )
  split = nn.functional(network)
  optimizer = train.make_optimizer(
    phase.recipe.optimizer, param_labels=split.param_labels
  )
  trainer = train.make_trainer(split, optimizer, lambda step: 0.0)
  expected = jax.eval_shape(trainer.init, jax.random.key(0))
  got = phases.memory(run, phase).state

  def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)

  assert shapes(got) == shapes(expected)


def test_every_phase_of_a_curriculum_is_listed():
  config = from_dict(VALUES | {"method": "bit_mixer"})
  text = dry_run.describe(config, "run")
  steps = 3 * EXAMPLES // 300
  for phase in ("float_weights", "quantized_weights", "mixed"):
    _, row = cells(text, f"multi_precision/{phase}")
    assert row[1:3] == [str(steps), "1"]


def test_every_separate_network_is_listed():
  stages = ("pretrain", "separate")
  text = dry_run.describe(from_dict(VALUES | {"stages": stages}), "run")
  for bits in (8, 2):
    _, row = cells(text, f"separate/{bits}")
    assert row[1:3] == [str(3 * EXAMPLES // 100), "1"]


def test_without_its_data_a_run_still_has_a_network(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  values = {
    "model": {"name": "resnet20"},
    "data": {"name": "tfds", "dataset": "cifar10", "path": str(tmp_path)},
  }
  text = dry_run.describe(from_dict(values), "run")
  assert "missing, so steps and times are unknown: data.dataset" in text
  assert "tfds build cifar10" in text
  # The head has ten classes.
  assert "network: resnet20, 272,282 parameters" in text
  assert "training at one bit-width takes about" in text
  assert len(cells(text, "multi_precision")) == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["folder", "idx", "text"])
def test_without_data_that_decide_the_network_there_is_no_more_to_say(name):
  values = {"data": {"name": name, "path": "nowhere"}}
  if name == "text":
    values["model"] = {"name": "transformer"}
  text = dry_run.describe(from_dict(values), "run")
  *_, last = text.split("\n\n")
  assert last.startswith("data are missing, so the network, whose sizes they")
  assert "data.path must" in last
  assert "\nnetwork" not in text


def test_errors_of_a_run_are_errors(tmp_path):
  with pytest.raises(ConfigError, match="stages: export must come after"):
    dry_run.describe(from_dict({"stages": ("export",)}), "run")
  with pytest.raises(ConfigError, match="model.options"):
    wrong = {"model": {"name": "resnet", "options": {"depth": 7}}}
    dry_run.describe(from_dict(VALUES | wrong), "run")
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ConfigError, match="is not empty and holds no run"):
    dry_run.describe(from_dict(VALUES), tmp_path)
  with pytest.raises(ConfigError, match="data.holdout must be"):
    wrong = VALUES["data"] | {"holdout": 1e-6}
    dry_run.describe(from_dict(VALUES | {"data": wrong}), "run")


def test_a_comparison_lists_its_methods_and_all_seeds(tmp_path):
  values = VALUES | {
    "seeds": (0, 1),
    "methods": {
      "lsq": {"method": "lsq"},
      "half": {
        "method": "double_rounding",
        "quant": {"bits": (4,)},
        "train": {"epochs": 6},
      },
    },
  }
  compared = comparison.from_values(values)
  text = dry_run.describe_comparison(compared, "run")
  assert "methods, with seeds 0, 1:" in text
  assert re.search("\nlsq: .*quant.weight='lsq'", text)
  assert "train.epochs=6" in text
  steps = {
    name: cells(text, name)[-1][1:3]
    for name in (
      "float/pretrain",
      "lsq/multi_precision",
      "half/multi_precision",
    )
  }
  assert steps == {
    "float/pretrain": [str(2 * EXAMPLES // 100), "1"],
    "lsq/multi_precision": [str(3 * EXAMPLES // 100), "2"],
    "half/multi_precision": [str(6 * EXAMPLES // 100), "1"],
  }
  macs = macs_of(text)
  passes = sum(int(n) * int(passes) for n, passes in steps.values())
  total = times.duration(2 * 3 * macs * 100 * passes / 1e6)
  assert f"\nabout {total} for 2 seeds: " in text
  # Each method's bit-widths are tested, those of all are stored.
  tests = [cells(text, f"{name}/export")[0][2] for name in ("lsq", "half")]
  assert tests == ["2", "1"]
  total = times.duration(2 * macs * 540 * 3 / 1e6)
  assert f"\nabout {total} for 2 seeds\n" in text
  assert [cells(text, b)[0][0] for b in ("8", "4", "2")] == ["8", "4", "2"]
  # A float network of its own, and a state for every method.
  assert [len(cells(text, name)) for name in steps] == [2, 2, 2]
  configs = [compared.base, *(e.config for e in compared.entries.values())]
  sizes = [pipeline.disk_bytes(RunContext(config, "run")) for config in configs]
  disk = decimal(2 * sum(sum(size.values()) for size in sizes))
  assert text.endswith(f"disk: at most {disk} in run; nothing was written")
  other = tmp_path / "run" / "seed1" / "half"
  other.mkdir(parents=True)
  (other / "file").write_text("mine")
  with pytest.raises(ConfigError, match="seed1/half is not empty"):
    dry_run.describe_comparison(compared, tmp_path / "run")


def layer(shape, macs, kind="", stride=1):
  parameters = math.prod(shape)
  return nn.LayerRow("layer", kind, shape, stride, parameters, macs, None, 8)


@pytest.mark.parametrize(
  "row",
  [
    layer((3, 3, 2, 4), 64 * 72),
    layer((3, 3, 1, 4), 16 * 36, stride=2),
    layer((8, 4), 32),
    layer((4, 2, 4), 5 * 32),
    layer((8, 4), 0, "embed"),
  ],
  ids=("convolution", "depthwise", "linear", "general", "lookup"),
)
def test_every_kind_of_product_is_measured(monkeypatch, row):
  monkeypatch.setattr(throughput, "_SECONDS", 0)
  assert throughput._macs_per_second(row, 3, "float32") > 0


def test_the_products_with_the_most_work_are_measured(monkeypatch):
  rates = {20: 10.0, 30: 30.0}
  monkeypatch.setattr(throughput, "_PRODUCTS", 2)
  monkeypatch.setattr(
    throughput, "_macs_per_second", lambda row, batch, dtype: rates[row.macs]
  )
  rows = [layer((2, 5), macs) for macs in (20, 10, 20, 30)]
  rows[2] = rows[2]._replace(name="other", bits=4)
  got = MEASURE(rows, batch=3, dtype="float32")
  # 40 at 10 a second, 30 at 30 a second, of 80.
  assert got == (70 / 5, 2, 70 / 80)


def test_missing_data_say_what_is_known_of_them():
  with pytest.raises(data.MissingData) as error:
    data.load("folder", path="nowhere", train_split="train")
  assert (error.value.shape, error.value.num_classes) == ((), 0)
