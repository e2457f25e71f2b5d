"""Runs the Triton IR that a Pallas kernel lowers to, in numpy, on any machine.

A GPU compiles this IR; Pallas' interpreter never sees it. Loads and stores
outside of an array fail, and so does a second store of a value.
"""

import itertools
import re
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest


class Pointers(NamedTuple):
  """Elements of a flat array, and which of all its elements were loaded."""

  array: np.ndarray
  loaded: np.ndarray
  offsets: np.ndarray

  def moved(self, offsets):
    return self._replace(offsets=self.offsets + offsets.astype(np.int64))

  def at(self, mask):
    """Offsets where the mask is set, checked."""
    chosen = self.offsets[mask]
    assert ((chosen >= 0) & (chosen < self.array.size)).all(), "out of bounds"
    return chosen


def run(kernel, *arrays):
  """Runs the only Pallas call in a function of arrays.

  Returns:
    The output of the call, and for each input which elements were read.
  """
  ir = pytest.importorskip("jax._src.lib.mlir").ir
  lowering = pytest.importorskip("jax._src.pallas.triton.lowering")
  traced = jax.jit(kernel).trace(*arrays)
  try:
    lowered = traced.lower(lowering_platforms=("cuda",))
  except RuntimeError as error:  # Newer versions of JAX want a device for it.
    pytest.skip(str(error))
  (call,) = _calls(lowered.compiler_ir().operation)
  config = call.attributes["mhlo.backend_config"]
  grid = [ir.IntegerAttr(config[f"grid_{axis}"]).value for axis in "xyz"]
  shape = ir.RankedTensorType(call.results[0].type).shape
  output = np.full(int(np.prod(shape)), np.nan, np.float32)
  flat = [*(np.asarray(a).reshape(-1) for a in arrays), output]
  zero = np.zeros((), np.int64)
  pointers = [
    Pointers(_signed(array), np.zeros(array.size, bool), zero) for array in flat
  ]
  with lowering._new_ir_context():
    module = ir.Module.parse(config["ir"].value_bytes)
    (function,) = module.body.operations
    (block,) = function.regions[0].blocks
    steps = _steps(block)
  with np.errstate(over="ignore"):
    for program in itertools.product(*map(range, grid)):
      values = [np.int32(number) for number in program] + pointers
      for function, places in steps:
        values.append(function(*(values[place] for place in places)))
  inputs = zip(pointers, arrays, strict=False)
  return output.reshape(shape), [p.loaded.reshape(a.shape) for p, a in inputs]


def _calls(operation):
  for region in operation.regions:
    for block in region.blocks:
      for inner in block.operations:
        if inner.operation.name == "stablehlo.custom_call":
          yield inner
        yield from _calls(inner.operation)


def _signed(array):
  """Integers of the IR have no sign."""
  return array.view(np.int32) if array.dtype == np.uint32 else array


def _steps(block):
  """(function, places of its operands) of each operation.

  Values have places: three numbers of the program, the arguments, and what the
  operations return, in order.
  """
  places = {argument: 3 + i for i, argument in enumerate(block.arguments)}
  steps = []
  for operation in block.operations:
    operation = operation.operation
    name = operation.name.split(".", 1)[1]
    if name == "return":
      continue
    operands = [places[operand] for operand in operation.operands]
    if name == "get_program_id":
      axis = re.search(r"get_program_id ([xyz])", str(operation))[1]
      function, operands = (lambda number: number), ["xyz".index(axis)]
    elif name in _PLAIN:
      function = _PLAIN[name]
    else:
      function = _MADE[name](operation)
    for result in operation.results:
      places[result] = 3 + len(block.arguments) + len(steps)
    steps.append((function, operands))
  return steps


_DTYPES = {
  "f32": np.float32,
  "bf16": ml_dtypes.bfloat16,
  "i32": np.int32,
  "i1": np.bool_,
}


def _type(operation):
  """Shape of the result, and its dtype unless it is a pointer."""
  text = str(operation.results[0].type)
  inner = re.fullmatch(r"tensor<(.*)>", text)
  *shape, dtype = (inner[1] if inner else text).split("x")
  return tuple(map(int, shape)), _DTYPES.get(dtype)


def _constant(operation):
  shape, dtype = _type(operation)
  value = operation.attributes["value"]
  value = np.array(value) if shape else dtype(value.value)
  return lambda: value


def _splat(operation):
  shape, _ = _type(operation)

  def splat(value):
    if isinstance(value, Pointers):
      return value._replace(offsets=np.full(shape, value.offsets))
    return np.full(shape, value, value.dtype)

  return splat


def _range(operation):
  start, end = (operation.attributes[name].value for name in ("start", "end"))
  return lambda: np.arange(start, end, dtype=np.int32)


def _expand(operation):
  axis = operation.attributes["axis"].value
  return lambda value: np.expand_dims(value, axis)


def _broadcast(operation):
  shape, _ = _type(operation)
  return lambda value: np.broadcast_to(value, shape)


def _bitcast(operation):
  _, dtype = _type(operation)
  return lambda value: value.view(dtype)


def _cast(operation):
  _, dtype = _type(operation)
  return lambda value: np.asarray(value).astype(dtype)


def _reduce(operation):
  assert "arith.addf" in str(operation)
  axis = operation.attributes["axis"].value
  return lambda value: value.sum(axis, dtype=value.dtype)


def _compare(operation):
  assert "cmpi slt" in str(operation)
  return np.less


# What depends on more than operands.
_MADE = {
  "constant": _constant,
  "splat": _splat,
  "make_range": _range,
  "expand_dims": _expand,
  "broadcast": _broadcast,
  "bitcast": _bitcast,
  "uitofp": _cast,
  "sitofp": _cast,
  "extf": _cast,
  "truncf": _cast,
  "reduce": _reduce,
  "cmpi": _compare,
}


def _load(pointers, mask, other):
  found = np.array(np.broadcast_to(other, mask.shape))
  chosen = pointers.at(mask)
  pointers.loaded[chosen] = True
  found[mask] = pointers.array[chosen]
  return found


def _store(pointers, value, mask):
  chosen = pointers.at(mask)
  assert np.isnan(pointers.array[chosen]).all(), "stored twice"
  pointers.array[chosen] = value[mask]


def _dot(a, b, c):
  return (a.astype(np.float64) @ b.astype(np.float64)).astype(c.dtype) + c


def _shift_right(a, b):
  return (a.view(np.uint32) >> b.view(np.uint32)).view(np.int32)


_PLAIN = {
  "addptr": Pointers.moved,
  "load": _load,
  "store": _store,
  "dot": _dot,
  "shrui": _shift_right,
  "shli": np.left_shift,
  "addi": np.add,
  "addf": np.add,
  "subi": np.subtract,
  "subf": np.subtract,
  "muli": np.multiply,
  "mulf": np.multiply,
  "andi": np.bitwise_and,
  "ori": np.bitwise_or,
  "xori": np.bitwise_xor,
  "divui": np.floor_divide,
  "remui": np.remainder,
}
