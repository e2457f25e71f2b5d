"""The registry of methods: names, recipes, options, and how files enter it."""

import importlib
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest

from dr_jax import quant
from dr_jax.quant import methods, registry

NEW_METHOD = '''
"""A method in one file."""

from __future__ import annotations

from collections.abc import Sequence

from dr_jax.quant.core import checks
from dr_jax.quant.core.interface import WeightQuantizer
from dr_jax.quant.methods.lsq import initial_scale, scale_per_bit_width
from dr_jax.quant.registry import Recipe, method


@method(halves=Recipe("halves", schedule="accumulate", bits=(8, 4)))
def halves(
  bits: Sequence[int] = (8, 4), *, factor: float | None = None
) -> WeightQuantizer:
  """Builds LSQ with a smaller scale.

  Shared between bit-widths: the weights. Stored: floats. Choose it never.
  """
  bits = checks.check_bits(bits)
  size = 0.5 if factor is None else factor
  return scale_per_bit_width(
    bits, lambda w, b: size * initial_scale(w, b, per_channel=True)
  )
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
  """Adds a file to `quant/methods`, for one test."""
  (tmp_path / "halves.py").write_text(NEW_METHOD)
  monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
  importlib.invalidate_caches()
  yield "halves"
  registry._FACTORIES.pop("halves", None)
  registry.RECIPES.pop("halves", None)
  sys.modules.pop("dr_jax.quant.methods.halves", None)
  vars(methods).pop("halves", None)


def test_equal_calls_return_the_same_quantizer():
  made = quant.lsq((8, 4))
  assert quant.get("lsq", bits=[np.int64(8), 4], per_channel=True) is made
  assert quant.lsq((8, 4), per_channel=False) is not made
  activation = quant.lsq_activation((8, 4), signed=None)
  assert activation.with_sign(True) is quant.lsq_activation((8, 4), signed=True)


def test_a_call_with_equal_arguments_of_wrong_types_is_still_an_error():
  quant.lsq((8, 4), per_channel=True)
  with pytest.raises(ValueError, match="per_channel must be"):
    quant.lsq((8, 4), per_channel=1)
  with pytest.raises(ValueError, match="bits"):
    quant.lsq((8.0, 4))


def test_new_file_enters_names_recipes_options_and_attributes(added):
  methods.discover()
  assert added in quant.NAMES
  assert quant.RECIPES[added].bits == (8, 4)
  assert quant.options_of("weight")["factor"] is float
  assert "factor" not in quant.options_of("activation")
  assert quant.halves is quant.find(added)
  assert quant.describe(added) == (
    "Builds LSQ with a smaller scale.",
    "the weights",
    "floats",
    "never",
  )


def test_new_file_gets_the_shared_checks_its_name_and_its_options(added):
  methods.discover()
  quantizer = quant.get(added, bits=[8, 4], factor=np.float64(0.25))
  assert quantizer.name == added
  assert quantizer.options == (("bits", (8, 4)), ("factor", 0.25))
  assert json.loads(json.dumps(quantizer.options))
  w = np.ones((3, 2), np.float32)
  params = quantizer.init(w)
  with pytest.raises(ValueError, match="index must be in"):
    quantizer.fake_quantize(params, w, 2)
  with pytest.raises(ValueError, match="weight must be finite"):
    quantizer.encode(params, w * np.nan)


def test_new_file_is_found_by_laws_configurations_and_comparison(tmp_path):
  """In a fresh process, whose registry has it from the start."""
  (tmp_path / "halves.py").write_text(NEW_METHOD)
  code = f"""
import sys
sys.path.append("tests/support")
from dr_jax.quant import methods
methods.__path__.append({str(tmp_path)!r})
methods.discover()
from configs import compare, digits
from dr_jax.config import from_dict
from tests.quant import laws_test
assert ("halves", ()) in laws_test.CASES
assert compare.get_config("halves").methods.halves.quant.bits == (8, 4)
config = digits.get_config()
assert "factor" in config.quant.weight_options
config.method = "halves"
config.quant.weight_options.factor = 0.25
config.quant.bits = (8, 4)
built = from_dict(config.to_dict())
assert built.quant.weight == "halves"
assert built.train.schedule == "accumulate"
assert built.quant.weight_options == {{"factor": 0.25}}
"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_registered_factory_is_found_and_its_name_cannot_be_taken_again():
  def mine(bits=(8, 4), *, option=1):
    return quant.lsq(bits)

  quant.register("mine_for_a_test", mine)
  quant.register("mine_for_a_test", mine)  # again: nothing new
  assert "mine_for_a_test" in quant.NAMES
  assert quant.get("mine_for_a_test", bits=(6,)).bits == (6,)
  assert quant.options_of("weight")["option"] is int
  with pytest.raises(
    ValueError, match="name must be.*'mine_for_a_test'.*taken"
  ):
    quant.register("mine_for_a_test", quant.lsq)
  with pytest.raises(ValueError, match="name must be.*'lsq'.*taken"):
    quant.register("lsq", mine)
  registry._FACTORIES.pop("mine_for_a_test")


def test_another_recipe_under_a_taken_name_is_an_error():
  quant.register_recipe("lsq", quant.RECIPES["lsq"])  # again: nothing new
  with pytest.raises(ValueError, match="name must be.*'lsq'.*taken"):
    quant.register_recipe("lsq", quant.Recipe("lsq", alrs="eta"))


@pytest.mark.parametrize("name", quant.RECIPES)
def test_every_recipe_builds_its_quantizers(name):
  recipe = quant.RECIPES[name]
  bits = recipe.bits or (8, 4)
  weight = quant.get(recipe.weight, bits=bits, **recipe.weight_options)
  assert isinstance(weight, quant.WeightQuantizer)
  if recipe.activation != "none":
    activation = quant.get(
      recipe.activation, bits=bits, **recipe.activation_options
    )
    assert isinstance(activation, quant.ActivationQuantizer)


@pytest.mark.parametrize("name", quant.NAMES)
def test_every_docstring_describes_the_method(name):
  description = quant.describe(name)
  assert description.summary.startswith("Builds ")
  assert description.choose
  if isinstance(quant.get(name), quant.WeightQuantizer):
    assert description.shared
    assert description.stored


def test_options_have_the_types_that_flags_need():
  weight = quant.options_of("weight")
  assert weight["scheme"] is str
  assert weight["per_channel"] is weight["rescale"] is bool
  assert weight["group"] is int
  assert weight["budgets"] is tuple
  assert "bits" not in weight
  activation = quant.options_of("activation")
  assert activation["initial"] is float
  # Calibration decides it, layer by layer.
  assert "signed" not in activation


def test_recipe_weighs_the_lowest_bit_width_only_among_several():
  recipe = quant.Recipe("lsq", lowest_loss_weight=1.0)
  assert recipe.loss_weights((8, 4, 2)) == (0.1, 0.1, 1.0)
  assert recipe.loss_weights((8,)) == ()
  assert quant.Recipe("lsq").loss_weights((8, 4)) == ()


def test_plain_activation_quantizer_says_that_it_has_no_with_sign():
  quantizer = quant.ActivationQuantizer(
    (8,), lambda x: {}, lambda params, x, index: x, signed=None
  )
  with pytest.raises(NotImplementedError, match="has no with_sign"):
    quantizer.with_sign(True)


def test_unknown_attribute_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'dorefa'"):
    quant.dorefa  # noqa: B018


@pytest.mark.parametrize("name", quant.NAMES)
def test_unknown_option_is_an_error_that_lists_the_known_ones(name):
  known = dict(quant.get(name).options)
  with pytest.raises(ValueError) as error:
    quant.get(name, temperature=1)
  assert f"temperature is not an option of {name};" in str(error.value)
  assert all(option in str(error.value) for option in known)


def test_unknown_method_is_an_error_that_lists_the_known_ones():
  with pytest.raises(ValueError, match="'dorefa'") as error:
    quant.get("dorefa")
  assert all(name in str(error.value) for name in quant.NAMES)


# What a configuration or an artifact can say.
VALUES = (None, True, False, 0, 1, -1, 2**31, 2**64, 10**30, 0.5, 1e308)
NOT_FINITE = (float("inf"), float("nan"))
OTHERS = ("", "x", "8", (), (1,), (4, 8), (2**40, 1), ((8,),), ("a",), {"x": 1})


@pytest.mark.parametrize("name", quant.NAMES)
def test_value_that_an_option_cannot_have_is_a_value_error(name):
  options = inspect.signature(registry.find(name)).parameters
  refused = 0
  for option in options:
    for value in (*VALUES, *NOT_FINITE, *OTHERS):
      try:
        quant.get(name, **{option: value})
      except ValueError as error:
        assert "\n" not in str(error)
        refused += 1
  assert refused >= 15 * len(options)


def test_option_that_is_true_or_false_has_no_other_value():
  with pytest.raises(
    ValueError, match="per_channel must be True or False, got 'no'"
  ):
    quant.get("lsq", per_channel="no")
  with pytest.raises(
    ValueError, match="signed must be True, False or None, got 1"
  ):
    quant.get("lsq_activation", signed=1)
