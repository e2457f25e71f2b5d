"""Values that went wrong somewhere, and configurations that have them."""

import dataclasses
import math

from mixed_job import values as mixed_job
from ml_collections import ConfigDict

from dr_jax.config import Config

NUMBERS = (
  *(0, 1, -1, 2, 3, 7, 1000, 2**31, 2**32, 2**63, -(2**63) - 1, 10**21),
  *(10**400, 10**5000, True, False, 0.0, -0.0, 0.5, 1.0, -1.0, 1.5, 3.7),
  *(math.inf, -math.inf, math.nan, 5e-324, 1e-40, -1e-40, 1e-300, 1e30, 1e308),
)
STRINGS = (
  *(
    "",
    " ",
    "x",
    "0",
    "none",
    "None",
    "../../x",
    "..",
    ".",
    "/",
    "/etc/passwd",
  ),
  *("~", "a/b", "a\nb", "\0", "a\0b", "\udcff", "\u202e", "x" * 300, "-x"),
  *("nan", "digits", "folder", "synthetic", "train", "error", "{0}", "%s"),
)
TUPLES = (
  *((), (0,), (8,), (1, 2), (8, 4), (8, 8), (2, 8), (-1,), (True,), (8.0, 4.0)),
  *((math.nan,), (math.inf, 1.0), (1e-40,), (10**400,), (0, 0, 0, 0), ("",)),
  *(("x",), ("greedy", "greedy"), ("bops", "bops"), ("pretrain", "pretrain")),
  *((None,), ((),), ((8,),), (("a", "b"), ("b", "c")), ({},), ([],)),
  *((b"x",), tuple(range(1000)), (0.1,) * 4, (1e-300, 1), (3.0, 3.0000001)),
)
OTHERS = (
  *(None, {}, [], {"x": 1}, {1: 2}, {"": None}, {"a\0": 1}, {"x": math.nan}),
  *({"x": {"y": set()}}, {"x": object}, {"x": b""}, {"greedy": {"x": 1}}),
  *({"greedy": None}, {"x": 10**5000}, set(), b"x", 1j, object, len, range(3)),
  *(ConfigDict(), ConfigDict({"x": 1}), Config(), [[[[[[[[[[[]]]]]]]]]]]),
)
VALUES = (*NUMBERS, *STRINGS, *TUPLES, *OTHERS)


def nested(depth):
  """A dict so deep that recursion would not end."""
  value = {}
  for _ in range(depth):
    value = {"x": value}
  return value


class Broken:
  """A value that cannot even be shown."""

  def __repr__(self):
    raise RuntimeError


UNUSUAL = (nested(9), nested(5000), Broken(), [Broken()], {"x": Broken()})


def fields(group=Config(), prefix=""):  # noqa: B008
  """Yields the names of all fields, "train.epochs", groups included."""
  for field in dataclasses.fields(group):
    name, value = f"{prefix}{field.name}", getattr(group, field.name)
    yield name
    if dataclasses.is_dataclass(value):
      yield from fields(value, f"{name}.")


def changed(values, name, value):
  """Returns nested dicts with one field replaced."""
  group, _, field = name.rpartition(".")
  if not group:
    return {**values, field: value}
  return {**values, group: {**values.get(group, {}), field: value}}


BASES = {
  "default": {},
  "mixed": mixed_job(),
  "synthetic": {
    "data": {"name": "synthetic"},
    "pretrain": {"optimizer": "sgd"},
  },
  "folder": {"data": {"name": "folder"}, "train": {"optimizer": "sgd"}},
}


def random_values(rng):
  """Returns nested dicts with a few fields of random values."""
  values = rng.choice(list(BASES.values()))
  for _ in range(rng.randint(2, 5)):
    name = rng.choice(list(fields()))
    value = rng.choice((*VALUES, *UNUSUAL))
    if isinstance(values.get(name.partition(".")[0], {}), dict):
      values = changed(values, name, value)
  return values
