"""Tests of the configuration as the library takes it: plain nested dicts."""

import pytest

from dr_jax.config import Config, ConfigError, from_dict, quantizers
from dr_jax.train import RECIPES


def test_missing_fields_keep_their_defaults():
  assert from_dict({}) == Config()
  assert from_dict({"train": {"epochs": 3}}).train.epochs == 3
  # One program for the bits of any layer, whatever is drawn.
  assert from_dict({}).supernet.vectorize == "sequential"


def test_numbers_and_lists_take_the_type_of_their_field():
  config = from_dict({"train": {"learning_rate": 1}, "quant": {"bits": [8, 2]}})
  assert config.train.learning_rate == 1.0
  assert config.quant.bits == (8, 2)


def test_a_method_sets_what_is_left_open_and_nothing_else():
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


def test_what_is_none_is_left_open():
  values = {"method": "adabits", "train": {"schedule": None}}
  assert from_dict(values).train.schedule == "accumulate"


def test_options_of_a_recipe_follow_its_own_quantizer_named_again():
  named = {"method": "adabits", "quant": {"weight": "adabits"}}
  left = from_dict({"method": "adabits"}).quant.weight_options
  assert from_dict(named).quant.weight_options == left != {}


def test_options_of_a_recipe_do_not_follow_another_quantizer():
  values = {"method": "adabits", "quant": {"weight": "lsq"}}
  config = from_dict(values)
  assert config.quant.weight_options == {}
  values["quant"]["weight_options"] = {"per_channel": False}
  assert from_dict(values).quant.weight_options == {"per_channel": False}


@pytest.mark.parametrize("method", RECIPES)
def test_every_recipe_is_a_configuration(method):
  bits = {"binary": (1,), "ternary": (2,)}.get(method, (8, 6, 4, 2))
  config = from_dict({"method": method, "quant": {"bits": bits}})
  weight, activation = quantizers(config.quant)
  assert weight.bits == bits
  assert activation is None or activation.bits == bits


def test_matquant_weighs_the_lowest_bit_width_ten_times_as_much():
  config = from_dict({"method": "matquant", "quant": {"bits": (8, 4, 2)}})
  assert config.train.loss_weights == (0.1, 0.1, 1.0)


def test_given_weights_stand_for_float_training():
  stages = ("multi_precision", "hessian")
  weights = {"weights": "resnet18.safetensors"}
  assert from_dict({"stages": stages, "model": weights}).stages == stages
  with pytest.raises(ConfigError, match="hessian is allowed after pretrain"):
    from_dict({"stages": stages})
  scored = {"model": weights, "pretrain": {"epochs": 0}}
  assert from_dict(scored).pretrain.epochs == 0


def test_one_bit_width_may_have_a_teacher_who_has_nothing_to_say():
  values = {"quant": {"bits": (4,)}, "train": {"distillation": "highest"}}
  assert from_dict(values).train.distillation == "highest"


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"sed": 1}, "sed=1: unknown field; allowed are name, method, seed"),
    ({"method": "dorefa"}, "method='dorefa': allowed are double_rounding"),
    (
      {"method": "binary", "quant": {"bits": (4,)}},
      r"quant.bits=\(4,\): binary takes",
    ),
    (
      {"method": "matquant", "quant": {"weight_options": {"signed": True}}},
      "quant.weight_options: .*matquant",
    ),
    (
      {"quant": {"weight_options": {"scheme": "x"}}},
      "quant.weight_options: option 'scheme' of double_rounding: allowed are",
    ),
    (
      {"quant": {"weight": "lsq_activation"}},
      "quant.weight='lsq_activation': is of kind ActivationQuantizer; allowed",
    ),
    (
      {"train": {"vectorize": "vmap"}},
      "train.vectorize='vmap': allowed with",
    ),
    (
      {"method": "bit_mixer", "quant": {"norm": "shared"}},
      "quant.norm='shared': allowed with train.curriculum='bit_mixer' are",
    ),
    (
      {"method": "bit_mixer", "train": {"distillation": "highest"}},
      "train.distillation='highest': allowed with sampling 'random'",
    ),
    (
      {"pretrain": {"sampling": "mixed"}},
      "pretrain.sampling='mixed': allowed is 'all'",
    ),
    (
      {"pretrain": {"loss_weights": (1.0,)}},
      r"pretrain.loss_weights=\(1.0,\): allowed is \(\)",
    ),
    (
      {"train": {"loss_weights": (float("inf"), 1.0, 1.0, 1.0)}},
      "train.loss_weights=.*finite",
    ),
    (
      {"quant": {"weight_options": {"shared": "no"}}},
      "quant.weight_options: shared='no': allowed are True and False",
    ),
    ({"train": {"sampling": "x"}}, "train.sampling='x': allowed are all"),
    ({"train": {"distillation": "x"}}, "train.distillation='x': allowed are"),
    ({"train": {"curriculum": "x"}}, "train.curriculum='x': allowed are none"),
    (
      {"train": {"loss_weights": (1.0, 2.0)}},
      r"train.loss_weights=\(1.0, 2.0\): allowed are 4 numbers",
    ),
    (
      {"train": {"loss_weights": (1.0, "a", 1.0, 1.0)}},
      "train.loss_weights=.*allowed are numbers",
    ),
    (
      {"train": {"loss_weights": (1.0, -1.0, 1.0, 1.0)}},
      "train.loss_weights=-1.0: allowed is 0 or more",
    ),
    ({"train": {"epohcs": 5}}, "train.epohcs=5: unknown field; allowed are ep"),
    ({"train": 3}, "train=3: allowed is a group of fields"),
    ({"seed": "1"}, "seed='1': has type str; allowed is int"),
    ({"seed": True}, "seed=True: has type bool; allowed is int"),
    (
      {"train": {"learning_rate": True}},
      "train.learning_rate=True: has type bool; allowed is float",
    ),
    ({"seed": -1}, "seed=-1: allowed is 0 or more"),
    ({"train": {"learning_rate": float("nan")}}, "train.learning_rate=nan: al"),
    ({"train": {"epochs": 0}}, "train.epochs=0: allowed is 1 or more"),
    ({"quant": {"bits": (2, 8)}}, r"quant.bits=\(2, 8\): .*integers from 8"),
    ({"quant": {"bits": (9,)}}, r"quant.bits=\(9,\): .*integers from 8"),
    ({"quant": {"norm": "none"}}, "quant.norm='none': allowed are switchable"),
    (
      {"model": {"dtype": "float16"}},
      "model.dtype='float16': allowed are floa",
    ),
    ({"pretrain": {"epochs": 0}}, "pretrain.epochs=0: allowed is 1 or more"),
    (
      {"model": {"weights": "w"}, "train": {"epochs": 0}},
      "train.epochs=0: allowed is 1 or more",
    ),
    (
      {"model": {"weights": "w"}, "pretrain": {"epochs": -1}},
      "pretrain.epochs=-1: allowed is 0 or more",
    ),
    ({"stages": ("train",)}, "stages='train': allowed are pretrain"),
    ({"stages": ("export",)}, "stages: export is allowed after multi_prec"),
    (
      {"stages": ("pretrain", "hessian", "multi_precision")},
      "stages: hessian is allowed after multi_precision only",
    ),
    ({"model": {"name": "vgg"}}, "model.name='vgg': allowed are resnet"),
    ({"checkpoint_every": 0}, "checkpoint_every=0: allowed is 1 or more"),
    ({"log_every": 0}, "log_every=0: allowed is 1 or more"),
    ({"data": {"batch_size": 0}}, "data.batch_size=0: allowed is 1 or more"),
    ({"data": {"channels": 2}}, "data.channels=2: allowed are 1, 3"),
    (
      {"data": {"mean": (0.5, float("nan"))}},
      r"data.mean=\(0.5, nan\): allowed are finite",
    ),
    ({"data": {"holdout": 1.5}}, "data.holdout=1.5: allowed are 0 to 1"),
    (
      {"pretrain": {"weight_decay": -1.0}},
      "pretrain.weight_decay=-1.0: allowed is 0 or more",
    ),
    ({"train": {"momentum": -0.1}}, "train.momentum=-0.1: allowed is 0 or"),
    ({"train": {"optimizer": "lamb"}}, "train.optimizer='lamb': allowed are"),
    ({"train": {"schedule": "x"}}, "train.schedule='x': allowed are alternate"),
    ({"train": {"alrs": "x"}}, "train.alrs='x': allowed are relative"),
    (
      {"train": {"loss_weights": (True, 1.0, 1.0, 1.0)}},
      "train.loss_weights=.*allowed are numbers",
    ),
    (
      {"pretrain": {"distillation": "highest"}},
      "pretrain.distillation='highest': allowed is 'none'",
    ),
    (
      {"pretrain": {"curriculum": "bit_mixer"}},
      "pretrain.curriculum='bit_mixer': allowed is 'none'",
    ),
    (
      {"supernet": {"curriculum": "bit_mixer"}},
      "supernet.curriculum='bit_mixer': allowed is 'none'",
    ),
    ({"hessian": {"min_probes": 1}}, "hessian.min_probes=1: allowed is 2 or"),
    (
      {"hessian": {"rel_stderr": float("nan")}},
      "hessian.rel_stderr=nan: allowed is more than 0",
    ),
    ({"hasb": {"warmup": -0.1}}, "hasb.warmup=-0.1: allowed are 0 to 1"),
    ({"devices": {"bits": 2}}, "devices.bits=2: allowed with train.vectorize="),
    (
      {
        "devices": {"norm": "per_device", "data": 2, "bits": 2},
        "train": {"schedule": "accumulate", "vectorize": "vmap"},
      },
      "devices.norm='per_device': with devices.data=2 and devices.bits=2",
    ),
    (
      {"stages": ("export",), "model": {"weights": "w"}},
      "stages: export is allowed after multi_precision only",
    ),
  ],
)
def test_what_is_wrong_is_named(values, message):
  with pytest.raises(ConfigError, match=message):
    from_dict(values)
