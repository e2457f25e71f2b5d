"""One ONNX file for every bit-width, from one set of stored codes.

A second input, "bits", chooses among the bit-widths at each call. Every one is
a branch of its own, with its own scales, norms and input codes; all derive
their weights from the same initializers, by nodes that read nothing else. ONNX
Runtime computes these once, when it loads the file, so that a branch runs as
fast as a file of its own, and the file has one copy of the codes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx

from dr_jax import nn
from dr_jax.deploy.artifact import Artifact
from dr_jax.deploy.export.graph import Value
from dr_jax.deploy.export.onnx.builder import Builder
from dr_jax.deploy.export.onnx.export import (
  INPUT,
  OPSET,
  OUTPUT,
  Added,
  add_network,
  check,
  info,
  save,
)

BITS = "bits"


def export_onnx_switchable(
  path: str | os.PathLike,
  network: nnx.Module | Artifact,
  sample_shape: Sequence[int],
  *,
  opset: int = OPSET,
  arithmetic: str = "exact",
) -> dict[int, dict[str, np.ndarray]]:
  """Writes a network at all its bit-widths as one ONNX file.

  Args:
    path, network, sample_shape, opset, arithmetic: as in `export_onnx`. The
      file has a second input, "bits", an int64 scalar: one that is not a
      candidate is read as the next higher one, or as the highest.

  Returns:
    By bits, what `export_onnx` returns.

  Raises:
    ImportError, ValueError, GraphError: as `export_onnx`.
  """
  check(opset, arithmetic)
  if isinstance(network, Artifact):
    network = network.load()
  network = nnx.clone(network)
  builder = Builder()
  for name in (INPUT, BITS, OUTPUT):
    builder.unique(name)
  branches = []
  for bits in nn.candidates(network):
    nn.set_bits(network, bits)
    branch = builder.branch()
    added = add_network(branch, network, sample_shape, arithmetic, None)
    branches.append(_Branch(bits, branch, added))
  first = branches[0].network
  builder.nodes, chosen = _chosen(builder, branches)
  builder.add("Identity", chosen, output=OUTPUT)
  choice = Value((), np.dtype(np.int64))
  save(path, builder, {INPUT: first.x, BITS: choice}, first.y, opset)
  return {branch.bits: branch.network.exact for branch in branches}


class _Branch(NamedTuple):
  """The nodes of one bit-width."""

  bits: int
  builder: Builder
  network: Added


def _chosen(builder, branches):
  """Nodes that compute the branch of the bits asked for; their output."""
  import onnx

  (bits, branch, network), *rest = branches
  if not rest:
    return branch.nodes, network.name

  def graph(name, nodes, output):
    return onnx.helper.make_graph(nodes, name, [], [info(output, network.y)])

  choice = builder.branch()
  lower = choice.constant(np.int64(rest[0].bits), "bits")
  is_higher = choice.add("Greater", BITS, lower)
  output = choice.add(
    "If",
    is_higher,
    then_branch=graph(f"bits_{bits}", branch.nodes, network.name),
    else_branch=graph(f"below_bits_{bits}", *_chosen(builder, rest)),
  )
  return choice.nodes, output
