"""Every field with every value that went wrong somewhere, in this process."""

import dataclasses
import itertools
import json
import math
import random

import pytest
from mixed_job import values as mixed_job
from unusual import BASES, UNUSUAL, VALUES, changed, fields, random_values

from dr_jax import quant, search
from dr_jax.config import Config, ConfigError, from_dict


def outcome(values):
  """A configuration, or the words of its error; anything else is raised."""
  try:
    config = from_dict(values)
  except ConfigError as error:
    words = str(error)
    assert "\n" not in words and len(words) < 1000, words
    assert " must " in words or " its options are " in words, words
    return words
  # What the run's directory will hold.
  json.dumps(dataclasses.asdict(config), allow_nan=False)
  return config


METHODS = tuple(quant.RECIPES)
OPTIONS = {
  "quant.weight_options": (*quant.options_of("weight"), "x"),
  "quant.activation_options": (*quant.options_of("activation"), "x"),
  "model.options": ("depth", "widths", "width", "dtype", "channels", "x"),
}


def cases_of_fields():
  """Yields a configuration, and the field that has an unusual value there."""
  for base, name in itertools.product(BASES.values(), fields()):
    for value in (*VALUES, *UNUSUAL):
      yield changed(base, name, value), name.rpartition(".")[2]


def cases_of_searches():
  """The same for the options of searches."""
  for strategy in search.SEARCHES:
    for option in (*search.options_of(strategy), "seed", "", "x"):
      for value in (*VALUES, *UNUSUAL):
        options = {strategy: {option: value}}
        yield mixed_job(search={"options": options}), option


def cases_of_methods():
  """The same for the options of quantizers and networks."""
  for method, (name, options) in itertools.product(METHODS, OPTIONS.items()):
    for option, value in itertools.product(options, (*VALUES, *UNUSUAL)):
      yield changed({"method": method}, name, {option: value}), option


@pytest.mark.parametrize("every", [20, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  ("cases", "count"),
  [
    (cases_of_fields, 39_000),
    (cases_of_searches, 6_600),
    (cases_of_methods, 49_000),
  ],
)
def test_every_value_of_every_field_is_accepted_or_one_line(
  cases, count, every
):
  tried = list(cases())
  assert len(tried) >= count
  start = random.Random(13).randrange(every)
  accepted = 0
  for values, field in tried[start::every]:
    found = outcome(values)
    if isinstance(found, Config):
      accepted += 1
    else:
      # Of two options that do not fit each other either may be named.
      assert field in found or "_options" in found, (found, field)
  assert accepted < 0.3 * len(tried) / every


@pytest.mark.parametrize(
  "cases", [500, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_random_values_of_several_fields_are_accepted_or_one_line(cases):
  rng = random.Random(13)
  for _ in range(cases):
    outcome(random_values(rng))


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "", ".x", "x" * 61])
def test_a_name_is_one_directory(name):
  with pytest.raises(ConfigError, match=r"^name must be a file name of"):
    from_dict({"name": name})


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"data": {"path": "x"}}, "data.path must be '' with data.name='digits'"),
    (
      {"data": {"name": "folder", "examples": 3}},
      "data.examples must be 64 with data.name='folder', .* got 3",
    ),
    (
      {"data": {"name": "synthetic", "dataset": "cifar10"}},
      "data.dataset must be '' with data.name='synthetic'.*got 'cifar10'",
    ),
    (
      {"train": {"momentum": 0.5}},
      "train.momentum must be 0.9 with train.optimizer='adam', .* got 0.5",
    ),
    (
      {"quant": {"activation": "none", "activation_options": {"signed": True}}},
      "quant.activation_options must be empty with quant.activation='none'",
    ),
    (
      {"model": {"options": {"num_classes": 3}}},
      "model.options must not have num_classes, which the data decides, got 3",
    ),
  ],
)
def test_a_field_without_effect_is_an_error(values, message):
  with pytest.raises(ConfigError, match=message):
    from_dict(values)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"seed": 2**32}, "seed must be <= 4294967295, got 4294967296"),
    ({"seed": 2**63}, "seed must be <= 4294967295, got 9223372036854775808"),
    ({"data": {"workers": 1000}}, "data.workers must be <= 256, got 1000"),
    (
      {"train": {"momentum": 1.0, "optimizer": "sgd"}},
      "train.momentum must be < 1, got 1.0",
    ),
    ({"train": {"learning_rate": 1e400}}, "learning_rate must be <= 1000, got"),
    ({"train": {"learning_rate": 10**400}}, "learning_rate must be .* float"),
    (
      {"train": {"learning_rate": 5e-324}},
      r"learning_rate must be finite, 0 or from 1\.2e-38 to .*, got 5e-324",
    ),
    (
      {"train": {"loss_weights": (0, 0.0, 0, 0)}},
      r"train.loss_weights must have one > 0, got \(0, 0.0, 0, 0\)",
    ),
    (
      {"stages": ("pretrain", "pretrain")},
      "stages must be different, got pretrain 2 times",
    ),
    ({"stages": ()}, r"stages must not be empty, got \(\)"),
    (
      {"data": {"name": "synthetic", "examples": 10**7}},
      "data.examples must be such that the images take at most 8 GiB, got",
    ),
    (
      {"search": {"ties": (("a", "b"), ("b", "c"))}},
      "search.ties must be different, got b 2 times",
    ),
    (
      {"search": {"pinned": {"a": 8.0}}},
      "search.pinned.a must be a bit-width, got 8.0",
    ),
    (
      {"search": {"options": {"genetic": {"population": 10**21}}}},
      "search.options.genetic.population must be an integer of 64 bits, got 10",
    ),
    (
      {"search": {"options": {"edmips": {"steps": 10**7}}}},
      "search.options.edmips.steps must be an integer <= 1000000, got 10000000",
    ),
    (
      {"search": {"options": {"edmips": {"learning_rate": math.inf}}}},
      r"search.options.edmips.learning_rate must be finite, .* got inf",
    ),
    (
      {"search": {"options": {"edmips": {"learning_rate": 1e4}}}},
      r"edmips.learning_rate must be in 1e-12\.\.1000, got 10000.0",
    ),
    (
      {"search": {"options": {"hessian_ilp": {"objective": "x"}}}},
      "search.options.hessian_ilp.objective must be one of error, bits, got",
    ),
    (
      {
        "search": {
          "costs": ("bops", "sum_bits"),
          "options": {"greedy": {"per_cost": True}},
        }
      },
      "greedy.per_cost must be False with several search.costs, got True",
    ),
    (
      {"quant": {"weight_options": {"per_channel": 3}}},
      "quant.weight_options.per_channel must be True or False, got 3",
    ),
  ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(values, message):
  with pytest.raises(ConfigError, match=message):
    from_dict(values)
