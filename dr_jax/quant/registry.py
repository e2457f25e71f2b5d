"""The registry of methods: quantizers by name, and what belongs to each.

A method of the library is one file in `methods/` whose factories carry the
decorator `method`; everything that lists methods (configurations, comparisons,
benchmarks, laws, tables) reads them from here.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from dr_jax.quant.core import checks
from dr_jax.quant.core.interface import (
  ActivationQuantizer,
  WeightQuantizer,
)

Quantizer = WeightQuantizer | ActivationQuantizer
P = ParamSpec("P")
Q = TypeVar("Q", WeightQuantizer, ActivationQuantizer)


class Recipe(NamedTuple):
  """What belongs to a method in addition to its quantizers, as plain values.

  A configuration's `method` names a recipe. What methods share (optimizer,
  learning rate, epochs) is not part of it, so that a comparison gives all of
  them the same.

  Attributes:
    weight, activation: names for `get`; activation "none" for float.
    weight_options, activation_options: their keyword arguments.
    bits: the method's own candidate bit-widths, or None for any.
    norm: as in `nn.quantize`.
    schedule, sampling, distillation, alrs: as in `train.make_trainer`.
    lowest_loss_weight: weight of the lowest bit-width's loss where the others
      have 0.1 each (MatQuant); None for equal weights.
    curriculum: a name of `train.CURRICULA`.
  """

  weight: str
  activation: str = "lsq_activation"
  weight_options: Mapping[str, Any] = {}
  activation_options: Mapping[str, Any] = {}
  bits: tuple[int, ...] | None = None
  norm: str = "switchable"
  schedule: str = "alternate"
  sampling: str = "all"
  distillation: str = "none"
  alrs: str = "none"
  lowest_loss_weight: float | None = None
  curriculum: str = "none"

  def loss_weights(self, bits: tuple[int, ...]) -> tuple[float, ...]:
    """One factor per bit-width, or none."""
    if self.lowest_loss_weight is None or len(bits) == 1:
      return ()
    return (0.1,) * (len(bits) - 1) + (self.lowest_loss_weight,)


class Description(NamedTuple):
  """What a factory's docstring says of its method, for tables.

  Attributes:
    summary: the first line.
    shared: what all bit-widths share; "" for activations.
    stored: what a deployed weight consists of; "" for activations.
    choose: when to choose the method; "" if the docstring does not say.
  """

  summary: str
  shared: str
  stored: str
  choose: str


_FACTORIES: dict[str, Callable[..., Quantizer]] = {}
RECIPES: dict[str, Recipe] = {}

NAMES = _FACTORIES.keys()


def method(
  **recipes: Recipe,
) -> Callable[[Callable[P, Q]], Callable[P, Q]]:
  """Decorates the factory of a quantizer: registers, names and checks it.

  The quantizer gets the factory's name, and its arguments as options (a factory
  that resolves a default returns what it resolved to in `options`). Its
  functions get the checks that all methods share: finite arrays outside of a
  trace, an index among the candidates, a sign that is decided. An activation
  quantizer gets `with_sign`: the same call with another `signed`. Equal calls
  return the same quantizer, so that its programs are traced and compiled once.

  Args:
    **recipes: recipes by name; none for a quantizer that only others use.
  """

  # Typed from outside: what a factory takes and returns, its decoration does.
  def decorate(factory: Any) -> Any:
    name = factory.__name__
    signature = inspect.signature(factory)
    built: dict[str, Any] = {}

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> Any:
      bound = signature.bind(*args, **kwargs)
      bound.apply_defaults()
      given = {key: _plain(value) for key, value in bound.arguments.items()}
      _check_switches(signature, given)
      # As text: 1, 1.0 and True are equal, and an array has no hash.
      call = repr(given)
      if call not in built:
        built[call] = made(given)
      return built[call]

    def made(given: dict[str, Any]) -> Any:
      quantizer = factory(**given)
      given = given | {"bits": quantizer.bits, **dict(quantizer.options)}
      named = {"name": name, "options": tuple(given.items())}
      if isinstance(quantizer, WeightQuantizer):
        return _checked_weight(quantizer)._replace(**named)
      return _checked_activation(quantizer)._replace(
        with_sign=lambda signed: build(**{**given, "signed": signed}), **named
      )

    register(name, build)
    for recipe_name, recipe in recipes.items():
      register_recipe(recipe_name, recipe)
    return build

  return decorate


def register(name: str, factory: Callable[..., Quantizer]) -> None:
  """Adds a method to the registry, for configurations and artifacts.

  Args:
    name: what `get`, a configuration and an artifact call it; equal to the
      `name` of what the factory returns.
    factory: `factory(bits=..., *, option=default, ...)`, returning a
      WeightQuantizer or an ActivationQuantizer.

  Raises:
    ValueError: if the name belongs to another factory.

  >>> register("lsq", find("lsq"))  # again: no change
  """
  if _FACTORIES.setdefault(name, factory) is not factory:
    raise ValueError(f"name must be a new one, got {name!r}, which is taken")


def register_recipe(name: str, recipe: Recipe) -> None:
  """Adds a recipe, for the field `method` of configurations.

  Args:
    name: what a configuration calls it.
    recipe: what belongs to the method.

  Raises:
    ValueError: if the name belongs to another recipe.

  >>> register_recipe("lsq", RECIPES["lsq"])  # again: no change
  """
  if RECIPES.setdefault(name, recipe) != recipe:
    raise ValueError(f"name must be a new one, got {name!r}, which is taken")


def get(name: str, **options: Any) -> Quantizer:
  """Builds a quantizer by its registered name.

  Args:
    name: one of `NAMES`.
    **options: keyword arguments of that factory.

  Raises:
    ValueError: for an unknown name, an option that the method does not have,
      or an option's value that it does not allow.

  >>> get("lsq", bits=(4, 2)).options
  (('bits', (4, 2)), ('per_channel', True))
  """
  factory = find(name)
  known = inspect.signature(factory).parameters
  for option in sorted(options):
    if option not in known:
      raise ValueError(
        f"{option} is not an option of {name}; its options are "
        f"{', '.join(known)}"
      )
  return factory(**options)


def find(name: str) -> Callable[..., Quantizer]:
  """Returns the factory of a name.

  Raises:
    ValueError: for an unknown name.

  >>> find("lsq") is _FACTORIES["lsq"]
  True
  """
  checks.one_of("name", name, list(NAMES))
  return _FACTORIES[name]


def weight_names() -> list[str]:
  """Returns the names of the quantizers of weights.

  >>> "lsq" in weight_names(), "lsq_activation" in weight_names()
  (True, False)
  """
  return _names(WeightQuantizer)


def activation_names() -> list[str]:
  """Returns the names of the quantizers of activations.

  >>> "lsq" in activation_names(), "lsq_activation" in activation_names()
  (False, True)
  """
  return _names(ActivationQuantizer)


def _names(kind):
  """Names of the factories that return a kind of quantizer."""
  return [
    name for name, factory in _FACTORIES.items() if _kind(factory) is kind
  ]


@functools.cache
def _kind(factory):
  """What a factory returns: what it says, else what it does."""
  returned = inspect.signature(factory, eval_str=True).return_annotation
  return type(factory()) if returned is inspect.Signature.empty else returned


def options_of(role: str) -> dict[str, type]:
  """Options of all quantizers of a role, for command-line flags.

  Args:
    role: "weight" or "activation".

  Returns:
    {option: bool, int, float, str or tuple}, by the default, or by the
    annotation where the default is None. `bits` belongs to all and is not among
    them, nor is the sign of an activation, which calibration decides. Where
    methods disagree about a type, the one registered first decides.

  >>> options_of("activation")["terms"]
  <class 'tuple'>
  """
  kind = {"weight": WeightQuantizer, "activation": ActivationQuantizer}[role]
  found: dict[str, type] = {}
  for name in _names(kind):
    signature = inspect.signature(_FACTORIES[name], eval_str=True)
    for parameter in signature.parameters.values():
      found.setdefault(parameter.name, _flag_type(parameter))
  for name in ("bits", "signed")[: 1 if role == "weight" else 2]:
    found.pop(name, None)
  return found


def describe(name: str) -> Description:
  """Reads the description of a method from its docstring.

  Args:
    name: one of `NAMES`.

  Raises:
    ValueError: for an unknown name.

  >>> describe("double_rounding").stored
  'codes of bits[0] bits and float32 scales'
  """
  text = inspect.getdoc(find(name)) or ""
  summary, words = text.partition("\n")[0], " ".join(text.split())

  def sentence(start: str) -> str:
    found = re.search(rf"{start} (.*?)\.( |$)", words)
    return found[1] if found else ""

  return Description(
    summary=summary,
    shared=sentence("Shared between bit-widths:"),
    stored=sentence("Stored:"),
    choose=sentence("Choose it"),
  )


def _flag_type(parameter: inspect.Parameter) -> type:
  if parameter.default not in (None, parameter.empty):
    return type(_plain(parameter.default))
  hint = parameter.annotation
  for kind in typing.get_args(hint) or (hint,):
    kind = typing.get_origin(kind) or kind
    if kind in (Sequence, list, tuple):
      return tuple
    if kind in (bool, int, float, str):
      return kind
  return str


def _check_switches(
  signature: inspect.Signature, given: Mapping[str, Any]
) -> None:
  """Raises ValueError for an option that must be True or False and is not."""
  for name, parameter in signature.parameters.items():
    hint, value = parameter.annotation, given[name]
    open_too = hint == "bool | None"
    known = isinstance(value, bool) or (open_too and value is None)
    if (hint == "bool" or open_too) and not known:
      allowed = "True, False or None" if open_too else "True or False"
      raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _plain(value: Any) -> Any:
  """The value as JSON and a hash can take it."""
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, list | tuple):
    return tuple(map(_plain, value))
  return value


def _checked_weight(q: WeightQuantizer) -> WeightQuantizer:
  def init(w):
    checks.check_finite("weight", w)
    return q.init(w)

  def fake_quantize(params, w, index):
    checks.check_index(index, q.bits)
    checks.check_finite("weight", w)
    return q.fake_quantize(params, w, index)

  def encode(params, w):
    checks.check_finite("weight", w)
    return q.encode(params, w)

  def decode(encoded, index):
    checks.check_index(index, q.bits)
    return q.decode(encoded, index)

  return q._replace(
    init=init, fake_quantize=fake_quantize, encode=encode, decode=decode
  )


def _checked_activation(q: ActivationQuantizer) -> ActivationQuantizer:
  def init(x):
    checks.check_sign(q.signed)
    checks.check_finite("activation", x)
    return q.init(x)

  def fake_quantize(params, x, index):
    checks.check_sign(q.signed)
    checks.check_index(index, q.bits)
    return q.fake_quantize(params, x, index)

  return q._replace(init=init, fake_quantize=fake_quantize)
