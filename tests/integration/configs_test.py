"""The configuration files: every one of them can be run, as it says."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import pytest
import quick_compilation
from flax import nnx

from dr_jax import models
from dr_jax.config import from_dict
from dr_jax.pipeline import comparison, dry_run
from dr_jax.runtime.tasks import TASKS
from dr_jax.train import alrs

ROOT = pathlib.Path(__file__).parents[2]
IMAGENET = ("resnet18", "resnet50", "mobilenetv2")
MIXED = ("resnet18_mixed", "resnet50_mixed")
PAPER = (*IMAGENET, *MIXED, "resnet20_cifar10")
TRANSFORMERS = ("language", "vit")


def load(name):
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(f"configs_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def config(name, arg=None):
  return from_dict(load(name).get_config(arg).to_dict())


def test_every_configuration_file_of_one_network_is_tested_here():
  files = {path.stem for path in (ROOT / "configs").glob("*.py")}
  assert files == {
    *(*PAPER, *TRANSFORMERS),
    *("digits", "digits_mixed", "compare", "language_compare"),
    *("fashion_mnist", "fashion_mnist_mixed"),
  }


def test_a_configuration_file_runs_no_other_one():
  for path in (ROOT / "configs").glob("*.py"):
    for word in ("runpy", "importlib", "exec(", "open("):
      assert word not in path.read_text(), path


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("arg", [None, "432", "8642", "smoke", "432,smoke"])
def test_a_configuration_is_one_that_the_library_accepts(name, arg):
  wanted = config(name, arg)
  digits = (arg or "").partition(",")[0]
  if digits.isdecimal():
    assert wanted.quant.bits == tuple(map(int, digits))
  elif name in MIXED:
    assert wanted.quant.bits == (4, 3, 2)
  else:
    assert wanted.quant.bits == (8, 6, 4, 2)
  # Only different names make different directories.
  assert wanted.name == "_".join(filter(None, (name, *(arg or "").split(","))))


@pytest.mark.parametrize(
  ("name", "arg"),
  [
    *(("language", arg) for arg in (None, "84", "weights", "small", "smoke")),
    *(("vit", arg) for arg in (None, "432", "fashion", "smoke", "432,smoke")),
  ],
)
def test_a_configuration_of_a_transformer_builds_its_network(name, arg):
  wanted = config(name, arg)
  language = name == "language"
  bits = (arg or "").partition(",")[0]
  bits = bits if bits.isdecimal() else ("842" if language else "8642")
  assert wanted.quant.bits == tuple(map(int, bits))
  assert wanted.name == "_".join(filter(None, (name, *(arg or "").split(","))))
  task = "language" if language else "classification"
  assert wanted.model.name in models.TASKS[task]
  implied = {}
  if arg == "fashion":
    implied = {"image_size": 28, "channels": 1, "num_classes": 10}
  built = nnx.eval_shape(
    lambda: models.build(
      wanted.model.name, rngs=nnx.Rngs(0), **wanted.model.options, **implied
    )
  )
  leaves = jax.tree.leaves(nnx.state(built, nnx.Param))
  millions = {"small": 0.1, "fashion": 0.2}
  size = millions.get(arg, 0.8 if language else 5.7)
  assert round(sum(leaf.size for leaf in leaves) / 1e6, 1) == size


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_docstring_of_a_transformer_has_command_and_estimated_time(name):
  text = " ".join(load(name).__doc__.split())
  assert f"python -m dr_jax.main --config=configs/{name}.py" in text
  assert "Time, an estimate and not a measurement" in text


def test_a_comparison_of_language_models_trains_three_bit_widths_of_five():
  compared = comparison.from_values(
    load("language_compare").get_config().to_dict()
  )
  for name in ("matquant", "double rounding"):
    recipe = compared.entries[name].config
    trained = zip(recipe.quant.bits, recipe.train.loss_weights, strict=True)
    assert [b for b, weight in trained if weight] == [8, 4, 2]
    assert recipe.train.schedule == "accumulate"
  assert {e.config.data.name for e in compared.entries.values()} == {"text"}


@pytest.mark.parametrize(
  ("arg", "bits", "entries"),
  [
    (None, (8, 6, 4, 2), 4 + 5 + 1 + 6),
    ("432", (4, 3, 2), 3 + 5 + 1 + 6),
    ("separate", (8, 6, 4, 2), 4),
    ("resnet20,432,alrs,rivals", (4, 3, 2), 5 + 6),
  ],
)
def test_fashion_mnist_compares_methods_at_equal_updates(arg, bits, entries):
  compared = comparison.from_values(
    load("fashion_mnist").get_config(arg).to_dict()
  )
  assert len(compared.entries) == entries
  assert len(compared.seeds) == 3
  alone, joint, modes = [], set(), set()
  for row, run in compared.entries.values():
    if "alrs=" in row:
      modes.add(run.train.alrs)
    else:
      assert run.train.alrs == "proportional"
    assert run.quant.init == "mse"
    if row == "separate lsq":
      alone += run.quant.bits
    else:
      joint.add(run.quant.bits)
    assert run.train.epochs == compared.base.train.epochs
    assert run.train.learning_rate == compared.base.train.learning_rate
  assert not alone or sorted(alone, reverse=True) == list(bits)
  assert joint <= {bits}
  assert modes == set(alrs.MODES) or arg == "separate"
  # Groups of one table share a directory; other networks and bits do not.
  shown = [word for word in ("432", "resnet20") if word in (arg or "")]
  assert compared.base.name == "_".join(["fashion_mnist", *shown])


@pytest.mark.parametrize("arg", [None, "432"])
def test_mixed_precision_on_fashion_mnist_scores_on_images_held_out(arg):
  wanted = config("fashion_mnist_mixed", arg)
  assert wanted.quant.bits == tuple(map(int, arg or "8642"))
  assert "search" in wanted.stages
  assert wanted.search.eval_split == "held_out"
  assert 60_000 * wanted.data.holdout == 3000


def test_fashion_mnist_names_what_its_argument_can_be():
  with pytest.raises(ValueError, match="of 432, resnet20, separate, alrs, dis"):
    load("fashion_mnist").get_config("lsq")


@pytest.mark.parametrize("name", PAPER)
def test_the_joint_recipe_is_the_papers(name):
  wanted = config(name)
  recipe, cifar = wanted.train, name == "resnet20_cifar10"
  assert wanted.method == "double_rounding"
  assert recipe.optimizer == "adam"
  assert (recipe.learning_rate, recipe.weight_decay) == (5e-4, 5e-5)
  assert recipe.epochs == (200 if cifar else 90)
  assert wanted.data.batch_size == (128 if cifar else 256)
  assert wanted.quant.norm == "switchable"
  assert wanted.data.name == "tfds"
  assert wanted.data.dataset == ("cifar10" if cifar else "imagenet2012")
  assert wanted.data.augment == (
    "pad_and_crop" if cifar else "random_resized_crop"
  )


@pytest.mark.parametrize(
  ("name", "epochs", "learning_rate", "weight_decay"),
  [
    ("resnet18", 90, 0.1, 1e-4),
    ("resnet50", 90, 0.1, 1e-4),
    ("resnet18_mixed", 90, 0.1, 1e-4),
    ("resnet50_mixed", 90, 0.1, 1e-4),
    ("mobilenetv2", 300, 0.045, 4e-5),
    ("resnet20_cifar10", 200, 0.1, 1e-4),
  ],
)
def test_the_float_recipe_is_that_of_the_docstring(
  name, epochs, learning_rate, weight_decay
):
  recipe = config(name).pretrain
  assert recipe.optimizer == "sgd" and recipe.momentum == 0.9
  assert recipe.epochs == epochs
  assert recipe.learning_rate == learning_rate
  assert recipe.weight_decay == weight_decay


@pytest.mark.parametrize("name", MIXED)
def test_the_mixed_precision_recipe_is_the_papers(name):
  wanted = config(name)
  assert wanted.search.costs == ("sum_bits",)
  assert wanted.search.budgets == (3.0,)
  assert config(name, "8642").search.budgets == (5.0,)
  assert wanted.hasb.sigma == 0.5
  # The first 10 of 90 epochs.
  assert wanted.hasb.warmup * wanted.supernet.epochs == pytest.approx(10)
  assert "hessian_ilp" in wanted.search.strategies
  assert wanted.stages.index("supernet") < wanted.stages.index("search")


@pytest.mark.parametrize("name", PAPER)
def test_a_smoke_run_has_the_same_network_and_stages(name):
  whole, smoke = config(name), config(name, "smoke")
  assert smoke.stages == whole.stages
  assert smoke.model == whole.model and smoke.quant == whole.quant
  assert smoke.data.name == "synthetic"
  assert smoke.train.epochs == 1
  assert name not in MIXED or smoke.supernet.epochs == 1


@pytest.mark.parametrize(
  ("name", "parameters"),
  [
    # Pre-activation: 11,689,512 and 25,557,032 less some norms.
    ("resnet18", 11_687_720),
    ("resnet50", 25_549_352),
    ("mobilenetv2", 3_504_872),
  ],
)
def test_the_network_is_the_one_that_the_paper_trains(name, parameters):
  model = config(name).model
  built = nnx.eval_shape(
    lambda: models.build(model.name, rngs=nnx.Rngs(0), **model.options)
  )
  leaves = jax.tree.leaves(nnx.state(built, nnx.Param))
  assert sum(leaf.size for leaf in leaves) == parameters


@pytest.mark.parametrize("name", [*IMAGENET, *MIXED])
def test_float_weights_of_torchvision_go_into_a_network_that_has_them(name):
  wanted = config(name, "torchvision")
  assert wanted.model.weights == f"{wanted.model.name}.safetensors"
  assert wanted.pretrain.epochs == 0
  assert not wanted.model.options.get("preactivation", False)
  assert wanted.train == config(name).train


@pytest.mark.parametrize(
  ("name", "arg"),
  [
    *((name, "smok") for name in PAPER),
    ("resnet18", "smoke,torchvision"),
    ("resnet18", "smoke,432"),
    ("resnet20_cifar10", "torchvision"),
  ],
)
def test_an_unknown_argument_is_an_error_that_lists_the_known(name, arg):
  with pytest.raises(
    ValueError, match=f"argument must be bit-wi.* got '{arg}'"
  ):
    load(name).get_config(arg)


@pytest.mark.parametrize("name", PAPER)
def test_the_docstring_has_the_command_the_targets_and_an_estimated_time(name):
  text = load(name).__doc__
  assert f"python -m dr_jax.main --config=configs/{name}.py" in text
  assert "arXiv 2502.01199" in text
  flat = " ".join(text.split())
  assert "reproduced here" in flat
  assert "Time, an estimate and not a measurement" in flat


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18_mixed", "vit", "language"])
def test_a_dry_run_says_what_a_run_would_do(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  wanted = config(name)
  text = dry_run.describe(wanted, "run")
  stored = text.split("has it:\n")[1].split("\n\n")[0]
  assert json.loads(stored)["name"] == name
  assert f"network: {wanted.model.name}, " in text
  trained = {"pretrain", "multi_precision", "supernet"} & {*wanted.stages}
  for stage in trained:
    assert f"\n{stage}  " in text
  assert ("data are missing" in text) == (name != "language")
  assert not (tmp_path / "run").exists()


# With few channels nothing but compilation takes long; of a transformer's
# twelve blocks, which are equal, two are enough.
SMALL = """
import runpy

def get_config(arg=None):
  config = runpy.run_path("configs/{name}.py")["get_config"](arg)
  config.model.name = "{network}"
  config.model.options = {{**config.model.options, **{options}}}
  return config
"""


# Compilation takes a minute, twice as long with twice the bit-widths. The
# stages of other files run in resnet18_mixed, their networks in other tests.
@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "bits", "network", "options"),
  [
    ("resnet18_mixed", (4, 2), "resnet18", {"width": 8}),
    ("vit", (8, 4), "vit", {"depth": 2}),
    ("language", (8, 4, 2), None, None),
  ],
)
def test_a_smoke_run_ends_with_a_table_and_an_artifact(
  name, bits, network, options, tmp_path
):
  file = ROOT / "configs" / f"{name}.py"
  if network:
    file = tmp_path / f"{name}.py"
    changes = {"name": name, "network": network, "options": options}
    file.write_text(SMALL.format(**changes))
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "dr_jax.main",
      f"--config={file}:smoke",
      f"--config.quant.bits={bits}",
      f"--workdir={tmp_path / 'run'}",
    ],
    cwd=ROOT,
    env=quick_compilation.environment(),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  wanted = config(name, "smoke")
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  stages = [stage for stage in wanted.stages if stage != "report"]
  assert list(summary["stages"]) == stages
  scores = summary["stages"]["export"]["scores"]
  assert list(scores) == [str(b) for b in bits]
  for b, score in scores.items():
    assert TASKS[summary["task"]].shown(score) in done.stdout, b
