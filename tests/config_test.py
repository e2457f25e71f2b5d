"""Tests of the configuration as the library takes it: plain nested dicts."""

import pytest

from dr_jax.config import Config, ConfigError, from_dict


def test_missing_fields_keep_their_defaults():
  assert from_dict({}) == Config()
  assert from_dict({"train": {"epochs": 3}}).train.epochs == 3


def test_numbers_and_lists_take_the_type_of_their_field():
  config = from_dict({"train": {"learning_rate": 1}, "quant": {"bits": [8, 2]}})
  assert config.train.learning_rate == 1.0
  assert config.quant.bits == (8, 2)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"sed": 1}, "sed=1: unknown field; allowed are name, seed"),
    ({"train": {"epohcs": 5}}, "train.epohcs=5: unknown field; allowed are ep"),
    ({"train": 3}, "train=3: allowed is a group of fields"),
    ({"seed": "1"}, "seed='1': has type str; allowed is int"),
    ({"seed": True}, "seed=True: has type bool; allowed is int"),
    ({"seed": -1}, "seed=-1: allowed is 0 or more"),
    ({"train": {"learning_rate": float("nan")}}, "train.learning_rate=nan: al"),
    ({"train": {"epochs": 0}}, "train.epochs=0: allowed is 1 or more"),
    ({"quant": {"bits": (2, 8)}}, r"quant.bits=\(2, 8\): allowed are"),
    ({"quant": {"bits": (9,)}}, r"quant.bits=\(9,\): allowed are"),
    ({"quant": {"norm": "none"}}, "quant.norm='none': allowed are switchable"),
    ({"stages": ("train",)}, "stages='train': allowed are pretrain"),
    ({"stages": ("export",)}, "stages: export is allowed after multi_prec"),
  ],
)
def test_what_is_wrong_is_named(values, message):
  with pytest.raises(ConfigError, match=message):
    from_dict(values)
