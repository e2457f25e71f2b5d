"""ONNX nodes and initializers, collected under unique names.

The onnx package is optional, and imported only where it is used.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  import onnx

MICROSOFT = "com.microsoft"


class Builder:
  """What becomes an ONNX graph.

  Attributes:
    nodes: in the order of computation.
    initializers: by name; branches share them.
  """

  def __init__(self):
    self.nodes: list[onnx.NodeProto] = []
    self.initializers: dict[str, onnx.TensorProto] = {}
    self._constants: dict[Any, str] = {}
    self._taken: set[str] = set()

  def branch(self) -> Builder:
    """Takes the nodes of a subgraph, which reads initializers of this graph."""
    builder = copy.copy(self)
    builder.nodes = []
    return builder

  def add(
    self,
    operation: str,
    *inputs: str,
    name: str = "",
    output: str = "",
    domain: str = "",
    **attributes: Any,
  ) -> str:
    """Appends a node with one output, named `output` or after its node.

    Returns:
      The name of the output.
    """
    import onnx

    output = output or self.unique(name or operation)
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

  def cast(self, name: str, dtype: Any) -> str:
    """A tensor in another dtype."""
    import onnx

    to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return self.add("Cast", name, to=to)

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
    found, number = name, 1
    while found in self._taken:
      number += 1
      found = f"{name}_{number}"
    self._taken.add(found)
    return found
