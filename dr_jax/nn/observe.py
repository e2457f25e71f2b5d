"""Records the calls of some modules of a network."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from dr_jax.nn.contraction import base_of, contraction_of
from dr_jax.nn.substitute import copy_attributes, substitute

# record(name, module, method, input, output)
Record = Callable[[str, Any, str, jax.Array, jax.Array], None]


def observed(
  model: nnx.Module,
  modules: Mapping[str, Any],
  record: Record,
  *,
  extra: Mapping[str, Mapping[str, nnx.Variable]] | None = None,
) -> nnx.Module:
  """Returns a copy in inference mode that records calls of its modules.

  Args:
    model: the network; it is not changed.
    modules: those of it to observe, by the name to record.
    record: called after each call of one of them, with the module as the call
      has it: inside a transformation its variables are those of the trace.
    extra: variables to give a module, by its name.
  """
  names = {id(module): name for name, module in modules.items()}
  copy = nnx.clone(model)
  pairs = zip(nnx.iter_modules(model), nnx.iter_modules(copy), strict=True)
  replacements: dict[int, nnx.Module] = {}
  for (_, module), (_, copied) in pairs:
    if (name := names.get(id(module))) is not None:
      observer = _observer(copied, functools.partial(record, name))
      for attribute, variable in (extra or {}).get(name, {}).items():
        setattr(observer, attribute, variable)
      replacements[id(copied)] = observer
  copy = substitute(copy, replacements)
  copy.eval()
  return copy


def _observer(module, record: Callable[..., None]):
  """The module, calling `record` on each call of its methods."""
  kind = type(module)

  class Observer(kind):
    computes_as = base_of(module)
    kernel_name = None

    def __init__(self):
      copy_attributes(self, module)

  known = base_of(module) is not None
  if known:  # it may be given further variables
    Observer.kernel_name = contraction_of(module).kernel
  for method in contraction_of(module).methods if known else ("__call__",):
    setattr(Observer, method, _recording(kind, method, record))
  return Observer()


def _recording(kind, name, record):
  method = getattr(kind, name)
  signature = inspect.signature(method)

  @functools.wraps(method)
  def recording(self, *args, **kwargs):
    y = method(self, *args, **kwargs)
    # The input is the first parameter, under whatever name.
    record(self, name, signature.bind(self, *args, **kwargs).args[1], y)
    return y

  return recording
