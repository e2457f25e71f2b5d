"""A deployed network that switches bit-widths while it serves.

Bits are an array among the inputs of one compiled program, so a switch
replaces one small value and compiles nothing. That value, a `_Snapshot`, is
immutable and has all that a request reads. A request takes it once, so it ends
at the bit-width with which it began, whatever is switched meanwhile.
"""

from __future__ import annotations

import functools
import operator
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dr_jax import nn
from dr_jax.allocate import Allocation, LatencyTable
from dr_jax.deploy import artifact as artifacts
from dr_jax.deploy.artifact import Artifact
from dr_jax.deploy.choices import Choice, Choices
from dr_jax.deploy.missing import Missing

# Backends that may have programs for the planes that are there, and no others.
_WHOLE = ("planes", "auto")


class _Snapshot(NamedTuple):
  """What a request reads.

  Attributes:
    choice: the assignment.
    index: int32 [layers], its positions among the candidate bit-widths.
    arrays: parameters and all other state of the network.
  """

  choice: Choice
  index: jax.Array
  arrays: dict[str, dict[str, Any]]


class Switchable:
  """Serves an artifact at a bit-width that can change at any time.

  Every method may be called from any thread. Stored codes are in memory once,
  whatever the bit-width, and of those that nest only the planes that were
  needed so far: a switch to more bits reads those that are missing. A program
  is compiled for each shape and dtype of inputs, at the first request that has
  them; a switch compiles nothing.

  >>> import tempfile
  >>> import jax.numpy as jnp
  >>> from dr_jax import deploy, quant
  >>> model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
  >>> network = nn.quantize(
  ...   model,
  ...   weight=quant.double_rounding((8, 4)),
  ...   sample=jnp.ones((1, 4)),
  ...   skip=(),
  ... )
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   deploy.save(f"{folder}/model", network)
  ...   served = deploy.Switchable(f"{folder}/model", model=model)
  >>> served.bits, served.bytes
  (8, 72)
  >>> served.switch(budget_bytes=70)
  >>> served.bits, served.bytes, served.predict(jnp.ones((2, 4))).shape
  (4, 60, (2, 6))
  """

  def __init__(
    self,
    artifact: str | os.PathLike | Artifact,
    *,
    bits: int | Mapping[str, int] | None = None,
    model: nnx.Module | None = None,
    sample: Any = None,
    allocations: Iterable[str | os.PathLike | Mapping[str, int]] = (),
    accuracy: Mapping[int | Allocation, float] | None = None,
    latency: str | os.PathLike | LatencyTable | None = None,
    backend: str = "float",
  ):
    """Opens an artifact and builds its network.

    Args:
      artifact: a directory, or what `deploy.open` returned.
      bits: one bit-width to start with, or {layer: bits}; the highest by
        default, or what the artifact was opened with. No more is read than it
        needs.
      model: the float network that was quantized, where the artifact names no
        architecture; see `deploy.load`.
      sample: anything with the shape and dtype of inputs (an array, a
        jax.ShapeDtypeStruct), to compile the program for them now.
      allocations: what budgets choose from besides uniform bit-widths: files of
        the export stage (`export/allocations/*.json`), or {layer: bits}.
      accuracy: {bits or allocation: accuracy} of all that budgets choose from.
      latency: what budgets of milliseconds go by, a file of
        `python -m dr_jax.benchmarks.latency`, measured on this device.
      backend: how layers compute; see `nn.set_backend`. "auto" needs a sample.
        With "planes" and "auto", and where layers are stacked (`nnx.scan`),
        all planes are read at once.

    Raises:
      ArtifactError: as `deploy.open` and `deploy.load`.
      ValueError: if bits are not candidates, an allocation is of another
        network, accuracy or latency lacks a choice, or the backend cannot
        compute a layer.
    """
    if latency is not None and not isinstance(latency, LatencyTable):
      latency = LatencyTable.load(latency)
    if not isinstance(artifact, Artifact):
      artifact = artifacts.open(artifact, bits)
    if backend in _WHOLE:
      artifact = artifact.upgrade()
    if sample is not None:
      sample = np.zeros(sample.shape, sample.dtype)
    load = functools.partial(
      Artifact.load, model=model, backend=backend, sample=sample
    )
    network = load(artifact)
    if any(row.layer.stack for row in nn.quantized.layer_rows(network)):
      # Planes are read layer by layer, and these layers share their arrays.
      artifact = artifact.upgrade()
      network = load(artifact)
    self._choices = Choices(artifact, allocations, accuracy, latency)
    self._missing = Missing(artifact)
    self._paths = _serve_all(network)
    apply, params, batch_stats, *_ = nn.functional(network)
    self._arrays = {"params": params, "batch_stats": batch_stats}
    self._switching = threading.Lock()
    self._to(self._choices.at(artifact.opened if bits is None else bits))

    @jax.jit
    def serve(arrays, index, x):
      return apply(arrays["params"], arrays["batch_stats"], index, x)[0]

    self._program = serve
    self._compiled: set[tuple[Any, ...]] = set()
    self._compiling = threading.Lock()
    if sample is not None:
      self.predict(sample)

  @property
  def candidates(self) -> tuple[int, ...]:
    """Candidate bit-widths, highest first."""
    return self._choices.candidates

  @property
  def choices(self) -> tuple[Choice, ...]:
    """What budgets choose from, most accurate first."""
    return self._choices.ordered

  @property
  def choice(self) -> Choice:
    """The assignment in use."""
    return self._serving.choice

  @property
  def bits(self) -> int | Allocation:
    """The bit-width in use: one, or those of the layers."""
    return self._serving.choice.bits

  @property
  def bytes(self) -> int:
    """Bytes that the bit-width in use needs; see `Artifact.bytes_at`."""
    return self._serving.choice.bytes

  def predict(self, x: Any) -> jax.Array:
    """Returns the network's outputs for inputs x.

    The bit-width is the one in use when it is called.
    """
    serving = self._serving
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    form = x.shape, x.dtype
    if form in self._compiled:
      return self._program(serving.arrays, serving.index, x)
    # Of requests that come first together, one compiles.
    with self._compiling:
      y = self._program(serving.arrays, serving.index, x)
      self._compiled.add(form)
    return y

  def switch(
    self,
    bits: int | Mapping[str, int] | None = None,
    *,
    budget_bytes: int | None = None,
    budget_ms: float | None = None,
  ) -> None:
    """Changes the bit-width of all requests that begin from now on.

    Takes one argument, and leaves the bit-width as it is if that is wrong. If
    planes are missing, returns when they are read, layer by layer; until then
    requests begin at the old bit-width.

    Args:
      bits: one bit-width, or {layer: bits}, such as an allocation of a search.
      budget_bytes: the most accurate of `choices` of at most so many bytes is
        taken: of the highest accuracy where accuracies were given, else of the
        most bytes, which stand for accuracy.
      budget_ms: the most accurate of `choices` that take at most so many
        milliseconds by the latency table, which estimates those that are not
        uniform.

    Raises:
      ArtifactError: if missing planes cannot be read or are damaged.
      ValueError: if bits are not candidates, an allocation is of another
        network, a budget is below the smallest choice, not exactly one argument
        is given, or there is no latency table for milliseconds.
    """
    arguments = {
      "bits": bits,
      "budget_bytes": budget_bytes,
      "budget_ms": budget_ms,
    }
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) != 1:
      raise ValueError(
        f"switch takes one of {', '.join(arguments)}, got "
        f"{' and '.join(given) or 'none'}"
      )
    choices = self._choices
    if budget_bytes is not None:
      choice = choices.within_bytes(budget_bytes)
    elif budget_ms is not None:
      choice = choices.within_ms(budget_ms)
    else:
      choice = choices.at(bits)  # pyrefly: ignore[bad-argument-type]
    with self._switching:
      self._to(choice)

  def _to(self, choice):
    """Reads what an assignment lacks, then serves it."""
    for name, pieces in self._missing.of(choice.allocation).items():
      path = self._paths[name]
      read = self._missing.read(name, pieces, _at(self._arrays, path))
      self._arrays = _replaced(self._arrays, path, read)
      # The same numbers at the old bit-width, so that old codes are let go.
      self._serving = self._serving._replace(arrays=self._arrays)
    index = jax.device_put(np.int32(choice.allocation.index(self.candidates)))
    self._serving = _Snapshot(choice, index, self._arrays)


def _serve_all(network):
  """Lifts the limits of what was read; says where each module has its arrays.

  The program is for every bit-width: no request begins at one that was not
  read.
  """
  paths: dict[str, tuple[str, ...]] = {}
  for path, module in nnx.iter_modules(network):
    if isinstance(module, nn.stored.Stored):
      module.first = 0
      paths[module.name] = ("params", *map(str, path), "encoded")
    elif isinstance(module, nn.FoldedNorm):
      module.held = tuple(range(module.rows))
      paths["/".join(map(str, path))] = ("batch_stats", *map(str, path))
  return paths


def _at(tree, path):
  return functools.reduce(operator.getitem, path, tree)


def _replaced(tree, path, arrays):
  """A tree with other arrays at a path, which shares all else."""
  if not path:
    return tree | arrays
  return tree | {path[0]: _replaced(tree[path[0]], path[1:], arrays)}
