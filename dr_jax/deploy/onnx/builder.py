"""ONNX nodes and initializers, collected under unique names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  import onnx

MICROSOFT = "com.microsoft"


class Builder:
  """What becomes an ONNX graph: `add` nodes, then `model`.

  Attributes:
    prefix: of the names of all values that nodes compute.
  """

  def __init__(self, prefix: str = ""):
    self.prefix = prefix
    self.nodes: list[onnx.NodeProto] = []
    self.initializers: dict[str, onnx.TensorProto] = {}
    self._constants: dict[Any, str] = {}
    self._taken: set[str] = set()

  def add(
    self,
    operation: str,
    *inputs: str,
    name: str = "",
    domain: str = "",
    **attributes: Any,
  ) -> str:
    """Appends a node with one output; returns the name of that."""
    import onnx

    output = self.unique(name or operation)
    self.nodes.append(
      onnx.helper.make_node(
        operation,
        list(inputs),
        [output],
        name=output,
        domain=domain,
        **attributes,
      )
    )
    return output

  def constant(self, array: Any, name: str = "constant") -> str:
    """The name of an initializer; equal arrays share one."""
    import onnx

    array = np.asarray(array)
    key = array.dtype.str, array.shape, array.tobytes()
    if key not in self._constants:
      self._constants[key] = found = self.unique(name)
      self.initializers[found] = onnx.numpy_helper.from_array(array, found)
    return self._constants[key]

  def unique(self, name: str) -> str:
    """The name, with a number where it is taken."""
    name = self.prefix + name
    found, number = name, 1
    while found in self._taken:
      number += 1
      found = f"{name}_{number}"
    self._taken.add(found)
    return found
