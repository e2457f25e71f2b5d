"""Tests of what files of configurations share."""

import pytest

from dr_jax import quant
from dr_jax.config import DataConfig, TrainConfig, files, from_dict


def test_a_group_has_every_field():
  group = files.group(DataConfig, batch_size=7)
  assert group.to_dict() == {
    **vars(DataConfig()),
    "batch_size": 7,
  }


@pytest.mark.parametrize("method", ["double_rounding", "adabits", "matquant"])
def test_groups_leave_to_the_method_what_belongs_to_it(method):
  values = {
    "method": method,
    "quant": files.quant_group((8, 4)).to_dict(),
    "train": files.train_group(epochs=3).to_dict(),
  }
  plain = {"method": method, "quant": {"bits": (8, 4)}, "train": {"epochs": 3}}
  assert from_dict(values) == from_dict(plain)


def test_every_option_of_a_quantizer_is_a_field_that_a_flag_can_set():
  group = files.quant_group((8, 4))
  assert set(group.weight_options) == set(quant.options_of("weight"))
  assert set(group.activation_options) == set(quant.options_of("activation"))
  assert set(files.train_group()) == set(vars(TrainConfig()))


@pytest.mark.parametrize(
  ("arg", "expected"),
  [
    (None, ("", "")),
    ("", ("", "")),
    ("432", ("432", "")),
    ("smoke", ("", "smoke")),
    ("432,other", ("432", "other")),
  ],
)
def test_an_argument_is_bit_widths_and_a_word(arg, expected):
  assert files.parse(arg, "smoke", "other") == expected


@pytest.mark.parametrize("arg", ["smok", "smoke,432", "432,smoke,432", "4x2"])
def test_another_argument_raises_an_error_with_those_known(arg):
  with pytest.raises(
    ValueError, match=f"bit-widths, as 432 or smoke, or both .* got '{arg}'"
  ):
    files.parse(arg, "smoke")
