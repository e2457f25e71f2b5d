"""A deployed network that switches bit-widths while it serves.

Bits are an array among the inputs of one compiled program, so a switch
replaces one small value and compiles nothing. That value, a `_Snapshot`, is
immutable and has all that a request reads. A request takes it once, so it ends
at the bit-width with which it began, whatever is switched meanwhile.
"""

from __future__ import annotations

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


class _Snapshot(NamedTuple):
  """What a request reads.

  Attributes:
    choice: the assignment.
    index: int32 [layers], its positions among the candidate bit-widths.
    arrays: parameters and all other state of the network.
  """

  choice: Choice
  index: jax.Array
  arrays: tuple[dict[str, Any], dict[str, Any]]


class Switchable:
  """Serves an artifact at a bit-width that can change at any time.

  Every method may be called from any thread. Stored codes are in memory once,
  whatever the bit-width. A program is compiled for each shape and dtype of
  inputs, at the first request that has them; a switch compiles nothing.

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
        default.
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

    Raises:
      ArtifactError: as `deploy.open` and `deploy.load`.
      ValueError: if bits are not candidates, an allocation is of another
        network, accuracy or latency lacks a choice, or the backend cannot
        compute a layer.
    """
    if not isinstance(artifact, Artifact):
      artifact = artifacts.open(artifact)
    if latency is not None and not isinstance(latency, LatencyTable):
      latency = LatencyTable.load(latency)
    self._choices = Choices(artifact, allocations, accuracy, latency)
    if sample is not None:
      sample = np.zeros(sample.shape, sample.dtype)
    network = artifact.load(model=model)
    nn.set_backend(network, backend, sample=sample)
    apply, params, batch_stats, *_ = nn.functional(network)
    self._arrays = params, batch_stats
    highest = self._choices.candidates[0]
    self._serving = self._snapshot(
      self._choices.at(highest if bits is None else bits)
    )

    @jax.jit
    def serve(arrays, index, x):
      return apply(*arrays, index, x)[0]

    self._program = serve
    self._compiled: set[tuple[Any, ...]] = set()
    self._compiling = threading.Lock()
    if sample is not None:
      self.predict(sample)

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

    Takes one argument, and leaves the bit-width as it is if that is wrong.

    Args:
      bits: one bit-width, or {layer: bits}, such as an allocation of a search.
      budget_bytes: the most accurate of `choices` of at most so many bytes is
        taken: of the highest accuracy where accuracies were given, else of the
        most bytes, which stand for accuracy.
      budget_ms: the most accurate of `choices` that take at most so many
        milliseconds by the latency table, which estimates those that are not
        uniform.

    Raises:
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
    self._serving = self._snapshot(choice)

  def _snapshot(self, choice):
    index = choice.allocation.index(self._choices.candidates)
    return _Snapshot(choice, jax.device_put(np.int32(index)), self._arrays)
