"""Tests of the configuration as the library takes it: plain nested dicts."""

import subprocess
import sys

import pytest

from dr_jax.config import Config, ConfigError, from_dict, quantizers
from dr_jax.quant import RECIPES
from dr_jax.search import SEARCHES


def test_fields_load_nothing_of_the_library():
  """Files of configurations need the fields alone."""
  code = "import sys, dr_jax.config; print(*sys.modules)"
  output = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout
  assert not {"jax", "flax", "optax", "dr_jax.train"} & set(output.split())


def test_missing_fields_keep_their_defaults():
  assert from_dict({}) == Config()
  assert from_dict({"train": {"epochs": 3}}).train.epochs == 3
  # One program for the bits of any layer, whatever is drawn.
  assert from_dict({}).supernet.vectorize == "sequential"


def test_numbers_and_lists_take_the_type_of_their_field():
  config = from_dict({"train": {"learning_rate": 1}, "quant": {"bits": [8, 2]}})
  assert config.train.learning_rate == 1.0
  assert config.quant.bits == (8, 2)


def test_a_method_sets_only_fields_that_are_left_open():
  config = from_dict({"method": "adabits"})
  assert config.quant.weight == "adabits"
  assert config.quant.weight_options == {"scheme": "modified", "rescale": True}
  assert config.quant.activation == "pact_activation"
  assert config.train.schedule == "accumulate"
  assert config.train.alrs == "none"
  assert config.pretrain.schedule == "alternate"
  by_hand = from_dict(
    {
      "method": "adabits",
      "quant": {
        "weight_options": {"scheme": "centered", "rescale": None},
        "activation": "lsq_activation",
      },
      "train": {"schedule": "alternate", "alrs": None},
    }
  )
  assert by_hand.quant.weight_options == {
    "scheme": "centered",
    "rescale": True,
  }
  assert by_hand.quant.activation == "lsq_activation"
  assert by_hand.train.schedule == "alternate"


def test_none_leaves_a_field_to_the_method():
  values = {"method": "adabits", "train": {"schedule": None}}
  assert from_dict(values).train.schedule == "accumulate"


def test_options_of_a_recipe_apply_if_its_quantizer_is_named():
  named = {"method": "adabits", "quant": {"weight": "adabits"}}
  left = from_dict({"method": "adabits"}).quant.weight_options
  assert from_dict(named).quant.weight_options == left != {}


def test_options_of_a_recipe_do_not_apply_to_another_quantizer():
  values = {"method": "adabits", "quant": {"weight": "lsq"}}
  config = from_dict(values)
  assert config.quant.weight_options == {}
  values["quant"]["weight_options"] = {"per_channel": False}
  assert from_dict(values).quant.weight_options == {"per_channel": False}


@pytest.mark.parametrize("method", RECIPES)
def test_every_recipe_is_a_configuration(method):
  bits = RECIPES[method].bits or (8, 6, 4, 2)
  config = from_dict({"method": method, "quant": {"bits": bits}})
  weight, activation = quantizers(config.quant)
  assert weight.bits == bits
  assert activation is None or activation.bits == bits


def test_matquant_weighs_the_lowest_bit_width_ten_times_as_much():
  config = from_dict({"method": "matquant", "quant": {"bits": (8, 4, 2)}})
  assert config.train.loss_weights == (0.1, 0.1, 1.0)


def test_given_weights_need_no_float_training():
  scored = {"model": {"weights": "w"}, "pretrain": {"epochs": 0}}
  assert from_dict(scored).pretrain.epochs == 0


def test_a_method_with_its_own_bit_width_sets_it():
  assert from_dict({"method": "binary"}).quant.bits == (1,)


def test_searches_that_are_left_open_are_all_of_them():
  values = {"stages": ("search",), "data": {"holdout": 0.1}}
  assert from_dict(values).search.strategies == tuple(SEARCHES)


def test_one_bit_width_allows_a_distillation_without_effect():
  values = {"quant": {"bits": (4,)}, "train": {"distillation": "highest"}}
  assert from_dict(values).train.distillation == "highest"


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"sed": 1}, "sed is not a field; it must be one of name, method, seed"),
    (
      {"method": "dorefa"},
      "method must be one of .*got 'dorefa'",
    ),
    (
      {"method": "binary", "quant": {"bits": (4,)}},
      r"quant\.bits of binary must be \(1,\), got \(4,\)",
    ),
    (
      {"method": "matquant", "quant": {"weight_options": {"signed": True}}},
      "quant.weight_options.signed must be None or False for matquant",
    ),
    (
      {"quant": {"weight_options": {"scheme": "x"}}},
      "quant.weight_options.scheme is not an option of double_rounding; it",
    ),
    (
      {"quant": {"weight": "lsq_activation"}},
      "quant.weight must be one of .*lsq, .* got 'lsq_activation'",
    ),
    (
      {"train": {"vectorize": "sequential", "steps_per_call": 4}},
      "train.steps_per_call must be 1 with train.vectorize='sequential'"
      ".* got 4",
    ),
    (
      {"train": {"steps_per_call": 0}},
      "train.steps_per_call must be >= 1, got 0",
    ),
    (
      {"train": {"vectorize": "vmap"}},
      "train.vectorize must not be 'vmap' with",
    ),
    (
      {"method": "bit_mixer", "quant": {"norm": "shared"}},
      "quant.norm must be switchable or transitional with train.curriculum='bi",
    ),
    (
      {"method": "bit_mixer", "train": {"distillation": "highest"}},
      "train.distillation must be none with sampling 'random'",
    ),
    (
      {"pretrain": {"sampling": "mixed"}},
      "pretrain.sampling must be 'all' for a float network, got 'mixed'",
    ),
    (
      {"pretrain": {"loss_weights": (1.0,)}},
      r"pretrain.loss_weights must be \(\) .*got \(1.0,\)",
    ),
    (
      {"train": {"loss_weights": (float("inf"), 1.0, 1.0, 1.0)}},
      "train.loss_weights must be <= 1000000, got inf",
    ),
    (
      {"quant": {"weight_options": {"shared": "no"}}},
      "quant.weight_options.shared must be True or False, got 'no'",
    ),
    ({"train": {"sampling": "x"}}, "train.sampling must be one of all"),
    ({"train": {"distillation": "x"}}, "train.distillation must be one of"),
    ({"train": {"curriculum": "x"}}, "train.curriculum must be one of none"),
    (
      {"train": {"loss_weights": (1.0, 2.0)}},
      r"train.loss_weights must be 4 numbers.* got \(1.0, 2.0\)",
    ),
    (
      {"train": {"loss_weights": (1.0, "a", 1.0, 1.0)}},
      "train.loss_weights must be a tuple of int or float, got",
    ),
    (
      {"train": {"loss_weights": (1.0, -1.0, 1.0, 1.0)}},
      "train.loss_weights must be >= 0, got -1.0",
    ),
    (
      {"train": {"epohcs": 5}},
      "train.epohcs is not a field; it must",
    ),
    ({"train": 3}, "train must be a group of fields, got 3"),
    ({"seed": "1"}, "seed must be of type int, got '1' of type str"),
    ({"seed": True}, "seed must be of type int, got True of type bool"),
    (
      {"train": {"learning_rate": True}},
      "train.learning_rate must be of type float, got True of type bool",
    ),
    ({"seed": -1}, "seed must be >= 0, got -1"),
    (
      {"train": {"learning_rate": float("nan")}},
      "learning_rate must be >= 0, got nan",
    ),
    ({"train": {"epochs": 0}}, "train.epochs must be >= 1, got 0"),
    (
      {"quant": {"bits": (2, 8)}},
      r"quant.bits must be .*got \(2, 8\)",
    ),
    (
      {"quant": {"bits": (9,)}},
      r"quant.bits must be .*got \(9,\)",
    ),
    (
      {"quant": {"norm": "none"}},
      "quant.norm must be one of switchable",
    ),
    (
      {"model": {"dtype": "float16"}},
      "model.dtype must be one of float32, bfloat16, got 'float16'",
    ),
    ({"pretrain": {"epochs": 0}}, "pretrain.epochs must be >= 1, got 0"),
    (
      {"model": {"weights": "w"}, "train": {"epochs": 0}},
      "train.epochs must be >= 1, got 0",
    ),
    (
      {"model": {"weights": "w"}, "pretrain": {"epochs": -1}},
      "pretrain.epochs must be >= 0, got -1",
    ),
    ({"model": {"name": "vgg"}}, "model.name must be one of resnet.*got 'vgg'"),
    ({"checkpoint_every": 0}, "checkpoint_every must be >= 1, got 0"),
    ({"log_every": 0}, "log_every must be >= 1, got 0"),
    ({"data": {"batch_size": 0}}, "data.batch_size must be >= 1, got 0"),
    ({"data": {"channels": 2}}, "data.channels must be one of 1, 3, got 2"),
    (
      {"data": {"mean": (0.5, float("nan"))}},
      "data.mean must be >= -1000, got nan",
    ),
    ({"data": {"holdout": 1.5}}, "data.holdout must be < 1, got 1.5"),
    (
      {"pretrain": {"weight_decay": -1.0}},
      "pretrain.weight_decay must be >= 0, got -1.0",
    ),
    ({"train": {"momentum": -0.1}}, "train.momentum must be >= 0, got -0.1"),
    ({"train": {"optimizer": "lamb"}}, "train.optimizer must be one of"),
    ({"train": {"schedule": "x"}}, "train.schedule must be one of alternate"),
    ({"train": {"alrs": "x"}}, "train.alrs must be one of relative"),
    (
      {"train": {"loss_weights": (True, 1.0, 1.0, 1.0)}},
      "train.loss_weights must be a tuple of int or float, got",
    ),
    (
      {"pretrain": {"distillation": "highest"}},
      "pretrain.distillation must be 'none' for a float",
    ),
    (
      {"pretrain": {"curriculum": "bit_mixer"}},
      "pretrain.curriculum must be 'none' for a float",
    ),
    (
      {"supernet": {"curriculum": "bit_mixer"}},
      "supernet.curriculum must be 'none', since",
    ),
    ({"hessian": {"min_probes": 1}}, "hessian.min_probes must be >= 2, got 1"),
    (
      {"hessian": {"rel_stderr": float("nan")}},
      "hessian.rel_stderr must be > 0, got nan",
    ),
    ({"hasb": {"warmup": -0.1}}, "hasb.warmup must be >= 0, got -0.1"),
    ({"devices": {"bits": 2}}, "devices.bits must be 1 with train.vectorize="),
    (
      {
        "devices": {"norm": "per_device", "data": 2, "bits": 2},
        "train": {"schedule": "accumulate", "vectorize": "vmap"},
      },
      "devices.norm='per_device' needs .* got devices.data=2 and devices.b",
    ),
  ],
)
def test_an_error_names_field_value_and_constraint(values, message):
  with pytest.raises(ConfigError, match=message):
    from_dict(values)
