"""What a deployed network can be switched to, and which of it fits a budget."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dr_jax.allocate import Allocation, LatencyTable
from dr_jax.allocate.problem import integer
from dr_jax.deploy.artifact import Artifact


class Choice(NamedTuple):
  """One assignment of bit-widths.

  Attributes:
    allocation: bits by layer.
    bytes: as `Artifact.bytes_at` counts them.
    milliseconds: of a batch, by a latency table; None without.
  """

  allocation: Allocation
  bytes: int
  milliseconds: float | None

  @property
  def bits(self) -> int | Allocation:
    """One bit-width if all layers have it, else the allocation."""
    used = set(self.allocation.values())
    return used.pop() if len(used) == 1 else self.allocation


class Choices:
  """Every assignment of an artifact, and those that budgets choose from.

  A budget chooses the most accurate of `ordered` that fits: the one with the
  highest accuracy where accuracies were given, else the one with the most
  bytes, which then stand for accuracy. Of equals the first wins: allocations as
  given, then uniform bit-widths from the highest.

  Attributes:
    layers: names of the quantized layers, in call order.
    candidates: candidate bit-widths, highest first.
    ordered: uniform bit-widths and given allocations, most accurate first.
  """

  def __init__(
    self,
    artifact: Artifact,
    allocations: Iterable[str | os.PathLike | Mapping[str, int]] = (),
    accuracy: Mapping[int | Allocation, float] | None = None,
    latency: LatencyTable | None = None,
  ):
    """See `Switchable`, whose arguments these are."""
    # Sizes alone are kept: an artifact holds codes once more, as stored.
    self._layer_bytes = artifact.layer_bytes
    self._other_bytes = artifact.tensor_bytes - sum(
      layer["stored"] for layer in self._layer_bytes.values()
    )
    self.layers = tuple(self._layer_bytes)
    self.candidates = artifact.bits
    self._latency = latency
    if latency is not None:
      latency.check(self.layers, self.candidates)
    self._uniform = {
      b: self._choice(Allocation.uniform(self.layers, b))
      for b in self.candidates
    }
    if isinstance(allocations, str | os.PathLike | Mapping):
      raise ValueError(
        f"allocations must be a list of files or {{layer: bits}}, got "
        f"{allocations!r}"
      )
    choices = [self.at(_read(allocation)) for allocation in allocations]
    choices += self._uniform.values()
    score = _scores(choices, accuracy)
    self.ordered = tuple(
      sorted(choices, key=lambda c: score[c.allocation], reverse=True)
    )

  def at(self, bits: int | Mapping[str, int]) -> Choice:
    """Returns an assignment, whether budgets choose from it or not.

    Raises:
      ValueError: if bits are not candidates, or of other layers.
    """
    if isinstance(bits, Mapping):
      given = Allocation(bits)
      given.check(self.layers, self.candidates)
      return self._choice(Allocation({n: given[n] for n in self.layers}))
    if bits not in self.candidates:
      raise ValueError(f"bits must be one of {self.candidates}, got {bits!r}")
    return self._uniform[bits]

  def within_bytes(self, budget: int) -> Choice:
    """Returns the most accurate choice of at most so many bytes.

    Raises:
      ValueError: if there is none.
    """
    budget = integer("budget_bytes", budget, at_least=0)
    return self._within("budget_bytes", budget, lambda choice: choice.bytes)

  def within_ms(self, budget: float) -> Choice:
    """Returns the most accurate choice of at most so many milliseconds.

    Raises:
      ValueError: if there is none, or no latency table.
    """
    if self._latency is None:
      raise ValueError(
        "budget_ms needs a latency table: Switchable(..., latency=path)"
      )
    if not isinstance(budget, numbers.Real):
      raise ValueError(f"budget_ms must be a number, got {budget!r}")
    return self._within("budget_ms", budget, lambda choice: choice.milliseconds)

  def _within(self, name, budget, cost):
    for choice in self.ordered:
      if cost(choice) <= budget:
        return choice
    least = min(map(cost, self.ordered))
    raise ValueError(
      f"{name} must be >= {least:.12g}, the smallest choice, got {budget}"
    )

  def _choice(self, allocation):
    needed = (self._layer_bytes[name][b] for name, b in allocation.items())
    ms = (
      None if self._latency is None else self._latency.milliseconds(allocation)
    )
    return Choice(allocation, self._other_bytes + sum(needed), ms)


def _read(allocation):
  if isinstance(allocation, Mapping):
    return allocation
  return Allocation.load(allocation)


def _scores(choices, accuracy):
  """{allocation: what stands for its accuracy}."""
  if accuracy is None:
    return {choice.allocation: choice.bytes for choice in choices}
  for choice in choices:
    if choice.bits not in accuracy:
      raise ValueError(
        f"accuracy must have every choice, but lacks {choice.bits!r}"
      )
    value = accuracy[choice.bits]
    if not _is_number(value):
      raise ValueError(
        f"accuracy[{choice.bits!r}] must be a number, got {value!r}"
      )
  return {choice.allocation: accuracy[choice.bits] for choice in choices}


def _is_number(value):
  """Whether numbers can be compared with it; arrays of one number can."""
  try:
    return not math.isnan(value)
  except TypeError:
    return False
