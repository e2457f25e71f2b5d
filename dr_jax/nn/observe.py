"""Records the calls of some modules of a network."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from dr_jax.nn.substitute import copy_attributes, substitute

# record(name, input, output)
Record = Callable[[str, jax.Array, jax.Array], None]


def observed(
  model: nnx.Module, modules: Mapping[str, Any], record: Record
) -> nnx.Module:
  """Returns a copy in inference mode that records calls of its modules.

  Args:
    model: the network; it is not changed.
    modules: those of it to observe, by the name to record.
    record: called after each call of one of them.
  """
  names = {id(module): name for name, module in modules.items()}
  copy = nnx.clone(model)
  pairs = zip(nnx.iter_modules(model), nnx.iter_modules(copy), strict=True)
  copy = substitute(
    copy,
    {
      id(copied): _observer(
        copied, functools.partial(record, names[id(module)])
      )
      for (_, module), (_, copied) in pairs
      if id(module) in names
    },
  )
  copy.eval()
  return copy


def _observer(module, record: Callable[[jax.Array, jax.Array], None]):
  """The module, calling `record(input, output)` on each call."""
  kind = type(module)
  signature = inspect.signature(kind.__call__)

  class Observer(kind):
    def __init__(self):
      copy_attributes(self, module)

    def __call__(self, *args, **kwargs):
      y = kind.__call__(self, *args, **kwargs)
      # The input is the first parameter, under whatever name.
      record(signature.bind(self, *args, **kwargs).args[1], y)
      return y

  return Observer()
