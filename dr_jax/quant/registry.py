"""The registry of methods: quantizers by name, and what belongs to each.

A method of the library is one file in `methods/` whose factories carry the
decorator `method`; everything that lists methods (configurations, comparisons,
benchmarks, laws, tables) reads them from here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

from dr_jax.quant.core import checks
from dr_jax.quant.core.interface import (
  ActivationQuantizer,
  Options,
  WeightQuantizer,
)

Quantizer = WeightQuantizer | ActivationQuantizer
P = ParamSpec("P")
Q = TypeVar("Q", WeightQuantizer, ActivationQuantizer)


class Recipe(NamedTuple):
  """What belongs to a method beside its quantizers, as plain values.

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
  trace, an index among the candidates, a sign that is decided.

  Args:
    **recipes: recipes by name; none for a quantizer that only others use.
  """

  def decorate(factory: Callable[P, Q]) -> Callable[P, Q]:
    name = factory.__name__
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def build(*args: P.args, **kwargs: P.kwargs) -> Q:
      bound = signature.bind(*args, **kwargs)
      bound.apply_defaults()
      quantizer = factory(*args, **kwargs)
      options = bound.arguments | dict(quantizer.options)
      options["bits"] = quantizer.bits
      return _checked(quantizer)._replace(name=name, options=_frozen(options))

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
  """
  if _FACTORIES.setdefault(name, factory) is not factory:
    raise ValueError(f"name must be a new one, got {name!r}, which is taken")


def register_recipe(name: str, recipe: Recipe) -> None:
  """Adds a recipe, for the field `method` of configurations.

  Raises:
    ValueError: if the name belongs to another recipe.
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
  checks.one_of("name", name, list(NAMES))
  known = list(inspect.signature(_FACTORIES[name]).parameters)
  for option in sorted(options):
    if option not in known:
      raise ValueError(
        f"{option} is not an option of {name}; it must be one of "
        f"{', '.join(known)}"
      )
  return _FACTORIES[name](**options)


def options_of(role: str) -> dict[str, type]:
  """Options of all quantizers of a role, for command-line flags.

  Args:
    role: "weight" or "activation".

  Returns:
    {option: bool, int, float, str or tuple}. `bits` belongs to all and is not
    among them, nor is the sign of an activation, which calibration decides.
  """
  kinds = {"weight": "WeightQuantizer", "activation": "ActivationQuantizer"}
  found: dict[str, type] = {}
  for factory in _FACTORIES.values():
    signature = inspect.signature(factory)
    if signature.return_annotation not in (kinds[role], Quantizer):
      continue
    for parameter in signature.parameters.values():
      if parameter.kind is parameter.KEYWORD_ONLY:
        found[parameter.name] = _flag_type(parameter)
  if role == "activation":
    found.pop("signed", None)
  return found


def _flag_type(parameter):
  """The type of a flag, from an annotation such as "Sequence[int] | None"."""
  words = str(parameter.annotation)
  if "Sequence" in words or "tuple" in words:
    return tuple
  for kind in (bool, int, float, str):
    if kind.__name__ in words:
      return kind
  return str


def _frozen(options: Mapping[str, Any]) -> Options:
  """Options as hashable pairs."""
  return tuple(
    (key, tuple(value) if isinstance(value, list) else value)
    for key, value in options.items()
  )


def _checked(quantizer: Any) -> Any:
  """The quantizer with the checks that all methods share."""
  if isinstance(quantizer, WeightQuantizer):
    return _checked_weight(quantizer)
  return _checked_activation(quantizer)


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
