"""Tests of what --help says of the fields of a configuration."""

import dataclasses
import pathlib
import re
import shlex
import sys

import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from dr_jax.config import Config, ConfigError, flags, from_dict
from dr_jax.config.checks import check_fields
from dr_jax.config.constraints import BOUNDS
from dr_jax.config.help import attributes, describe, field_help
from dr_jax.pipeline import comparison

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FIELDS = {field.name: field for field in field_help()}


def shown(name, width=80):
  """What is said of the configuration of a file, and that configuration."""
  values = flags.values(flags.load(str(CONFIGS / name)))
  config = from_dict(values)
  return describe(values, config, FIELDS.values(), width=width), config


def groups(kind=Config):
  yield kind
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(field.default):
      yield from groups(type(field.default))


@pytest.mark.parametrize(
  "group", dict.fromkeys(groups()), ids=lambda kind: kind.__name__
)
def test_a_docstring_says_what_every_field_means_and_no_other(group):
  names = [field.name for field in dataclasses.fields(group)]
  assert list(attributes(group)) == names
  assert all(attributes(group).values())


def outside(rules):
  """Values that break each bound, and the bound in words."""
  steps = {"at_least": -1, "above": 0, "at_most": 1, "below": 0}
  for key, (text, _) in BOUNDS.items():
    if key in rules:
      yield rules[key] + steps[key], text.format(rules[key])


def test_bounds_are_those_that_are_checked():
  checked = 0
  for group in ("data", "train", "hessian", "hasb", "search", "devices"):
    part = getattr(Config(), group)
    for field in dataclasses.fields(part):
      for value, words in outside(field.metadata):
        assert words in FIELDS[f"{group}.{field.name}"].allowed
        value = (value,) if field.type == "tuple" else value
        wrong = dataclasses.replace(part, **{field.name: value})
        with pytest.raises(ConfigError) as error:
          check_fields(wrong, f"{group}.")
        assert f"{group}.{field.name} must be {words}, got" in str(error.value)
        checked += 1
  assert checked > 40


def test_choices_and_other_constraints_are_said():
  allowed = {name: field.allowed for name, field in FIELDS.items()}
  assert allowed["train.schedule"] == "one of alternate, accumulate"
  assert re.match("one of none, .*lsq_activation", allowed["quant.activation"])
  assert "activation" not in allowed["quant.weight"]
  assert allowed["data.length"] == (
    "an integer >= 1 and <= 65536; only with data.name=text"
  )
  assert allowed["search.costs"] == (
    "a tuple, each one of stored_bits, bops, sum_bits, latency, not empty, all "
    "different"
  )
  assert allowed["train.loss_weights"] == (
    "a tuple, each a number >= 0 and <= 1000000"
  )
  assert allowed["name"].startswith("a file name of letters")


# Of ml_collections.
@pytest.mark.filterwarnings("ignore:the load_module")
@pytest.mark.parametrize("name", ["digits.py", "resnet18_mixed.py"])
def test_flags_as_they_are_shown_make_the_same_configuration(name, monkeypatch):
  text, config = shown(name)
  given = [line for line in text.splitlines() if line.startswith("--config.")]
  words = [word for line in given for word in shlex.split(line) if "=" in word]
  assert len(words) > 40
  argv = ["command", f"--config={CONFIGS / name}", *words]
  # Where config_flags looks for them.
  monkeypatch.setattr(sys, "argv", argv)
  values = absl_flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  values(argv)
  assert from_dict(flags.values(values.config)) == config


def test_a_field_of_the_method_shows_its_value():
  text, _ = shown("digits.py")
  assert "--config.quant.weight_options.rounding\n" in text
  assert "--config.train.alrs=eta\n" in text
  values = {"method": "adabits", "quant": {"weight": None}}
  text = describe(values, from_dict(values), FIELDS.values(), width=80)
  assert "--config.quant.weight=adabits\n" in text


def test_fields_that_the_file_lacks_have_no_flag():
  text, _ = shown("digits.py")
  inside, outside = text.split("Not in the file")
  assert "hessian.images" not in inside
  assert "\nhessian.images=1024\n" in outside
  assert "Training images that are used" in outside
  assert "--config" not in outside


def test_an_invalid_configuration_is_shown_as_it_is_written():
  values = {"train": {"epochs": -3, "alrs": None}}
  text = describe(values, None, FIELDS.values(), width=80)
  assert "--config.train.epochs=-3\n" in text
  assert "--config.train.alrs\n" in text


@pytest.mark.parametrize("width", [40, 100])
def test_text_is_wrapped_to_the_width(width):
  text, _ = shown("digits.py", width)
  prose = [line for line in text.splitlines() if line.startswith("    ")]
  assert width - 15 < max(map(len, prose)) <= width


def test_a_comparison_shows_its_methods_and_no_fields_that_are_theirs():
  values = flags.values(flags.load(f"{CONFIGS / 'compare.py'}:lsq,adabits"))
  text = describe(values, None, comparison.FIELDS, width=80)
  for line in (
    "--config.seeds='(0, 1, 2)'",
    "--config.methods.lsq.method=lsq",
    "--config.methods.adabits.row=adabits",
    "--config.pretrain.epochs=40",
  ):
    assert f"{line}\n" in text
  assert "\nstages=" not in text and "\nmethod=" not in text
