"""Kernels of a compiled program, and the lines of Python they come from.

Read from the text of XLA's optimized HLO: every instruction of the entry
computation that computes something is one launch on a GPU. XLA names for each
the traceback of the Python call that asked for it, of a fusion that of its
last operation; what the compiler adds by itself (other layouts) has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("convolution", "product", "reduction", "other fusion", "copy", "other")

# What only names memory.
_NOTHING = frozenset(
  ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
)
_INSTRUCTION = re.compile(
  r"^  (?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\(", re.MULTILINE
)


class Kernel(NamedTuple):
  """One instruction of the entry computation that computes something.

  Attributes:
    kind: one of KINDS; a fusion is what the heaviest operation in it is.
    backward: whether it belongs to a transposed function.
    frames: of the traceback, innermost first, as "path of the file, function";
      () where there is none.
  """

  kind: str
  backward: bool
  frames: tuple[str, ...]


def kernels(text: str) -> list[Kernel]:
  """Returns the kernels of a program, `compiled.as_text()`.

  >>> import jax
  >>> program = jax.jit(lambda x: (x @ x).sum()).lower(jax.numpy.eye(4))
  >>> sorted(kernel.kind for kernel in kernels(program.compile().as_text()))
  ['product', 'reduction']
  """
  bodies = dict(
    re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
  )
  (entry,) = re.findall(r"^ENTRY %?([\w.-]+) ", text, re.MULTILINE)
  tracebacks = _Tracebacks(text)
  found = []
  for line in bodies[entry].splitlines():
    match = _INSTRUCTION.match(line)
    if match is None or match[1] in _NOTHING:
      continue
    found.append(
      Kernel(
        kind=_kind(match[1], line, bodies),
        backward="transpose(" in _value("op_name", line),
        frames=tuple(tracebacks.of(line)),
      )
    )
  return found


def _kind(operation, line, bodies):
  target = _value("custom_call_target", line)
  operations = {operation}
  if operation == "fusion":
    (body,) = re.findall(r"calls=%?([\w.-]+)", line)
    operations = set(_INSTRUCTION.findall(bodies[body]))
  if "convolution" in operations or "conv" in target:
    return "convolution"
  if "dot" in operations or re.search("gemm|matmul", target):
    return "product"
  if "reduce" in operations:
    return "reduction"
  if operation == "copy" or operations <= _NOTHING | {"copy", "transpose"}:
    return "copy"
  return "other fusion" if operation == "fusion" else "other"


def _value(name, line):
  found = re.search(rf'\b{name}="((?:[^"\\]|\\.)*)"', line)
  return found[1] if found else ""


class _Tracebacks:
  """The tables in which a program keeps tracebacks."""

  def __init__(self, text):
    self._files = _table(text, "FileNames")
    self._functions = _table(text, "FunctionNames")
    self._places = _table(text, "FileLocations")
    self._frames = _table(text, "StackFrames")
    # Frame 1 has no parent: 0, but 1 in versions of XLA that add 1 to parents.
    self._base = _number("parent_frame_id", self._frames.get(1, ""))

  def of(self, line: str) -> Iterator[str]:
    """Yields every frame of an instruction."""
    number = _number("stack_frame_id", line)
    while number in self._frames:
      frame = self._frames[number]
      place = self._places[_number("file_location_id", frame)]
      file = self._files[_number("file_name_id", place)]
      function = self._functions[_number("function_name_id", place)]
      yield file.strip('"') + ", " + function.strip('"')
      number = _number("parent_frame_id", frame) - self._base


def _table(text, name):
  found = re.search(rf"^{name}\n(.*?)^$", text, re.MULTILINE | re.DOTALL)
  rows = re.findall(r"^(\d+) (.*)$", found[1], re.M) if found else ()
  return {int(number): row for number, row in rows}


def _number(name, text):
  found = re.search(rf"\b{name}=(\d+)", text)
  return int(found[1]) if found else 0
