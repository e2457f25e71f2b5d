"""An allocation: which layer computes with how many bits.

A mapping {layer path: bits}, so that whatever takes such a mapping takes an
allocation. Its file is the same mapping as a JSON object.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dr_jax.allocate.problem import integer
from dr_jax.runtime import files, schema

# A thousand times that of a network of a thousand layers.
_LARGEST = 2**26


class Allocation(Mapping[str, int]):
  """Bit-widths by layer, immutable and hashable, in the order given.

  Equal to every mapping with the same entries, in any order.

  >>> allocation = Allocation.from_index(["conv1", "conv2"], (8, 4), [0, 1])
  >>> allocation
  Allocation({'conv1': 8, 'conv2': 4})
  >>> allocation.mean_bits, allocation.index((8, 4)).tolist()
  (6.0, [0, 1])
  """

  __slots__ = ("_bits",)

  def __init__(self, bits: Mapping[str, int]):
    """Copies a mapping {layer path: bits}.

    Raises:
      ValueError: unless paths are strings and bits positive integers.
    """
    self._bits = {}
    for layer, b in bits.items():
      if not isinstance(layer, str) or not layer:
        raise ValueError(f"layer must be a non-empty string, got {layer!r}")
      self._bits[layer] = integer(f"bits[{layer!r}]", b, at_least=1)

  @classmethod
  def uniform(cls, layers: Iterable[str], bits: int) -> Allocation:
    """Returns the same bit-width for all layers."""
    return cls(dict.fromkeys(layers, bits))

  @classmethod
  def from_index(
    cls, layers: Sequence[str], bits: Sequence[int], index: Any
  ) -> Allocation:
    """Returns bits[index[l]] for every layer l.

    Args:
      layers: L paths.
      bits: B candidate bit-widths.
      index: [L] positions among them, as `solve` returns.

    Raises:
      ValueError: if lengths differ, a path repeats or a position is unknown.
    """
    positions = np.asarray(index).tolist()
    if len(positions) != len(layers) or len(set(layers)) != len(layers):
      raise ValueError(
        f"index must have one position for each of {len(layers)} layers, "
        f"{len(set(layers))} of them different, got {positions}"
      )
    for position in positions:
      integer("index", position, at_least=0, below=len(bits))
    pairs = zip(layers, positions, strict=True)
    return cls({layer: bits[position] for layer, position in pairs})

  @classmethod
  def from_json(cls, text: str) -> Allocation:
    """Reads what `to_json` wrote.

    Raises:
      ValueError: for anything but a JSON object of positive integers, or a
        layer that appears twice.
    """
    try:
      values = schema.parse(text)
      schema.check(values, {...: int})
    except ValueError as error:
      raise ValueError(
        f"allocation must be a JSON object {{layer: bits}}: {error}"
      ) from None
    return cls(values)

  @classmethod
  def load(cls, path: str | os.PathLike) -> Allocation:
    """Reads a file that `save` wrote.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it holds anything else, naming the file.
    """
    try:
      content = files.read_bytes(path, limit=_LARGEST)
      return cls.from_json(content.decode())
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None

  def to_json(self) -> str:
    """Returns a JSON object with a line per layer."""
    return json.dumps(self._bits, indent=2, ensure_ascii=False) + "\n"

  def save(self, path: str | os.PathLike) -> None:
    """Writes a file that `load` reads; it appears complete or not at all."""
    files.write_text(path, self.to_json())

  def check(self, layers: Iterable[str], bits: Sequence[int]) -> None:
    """Checks that it fits a network.

    Args:
      layers: the paths it must have, no more and no fewer.
      bits: candidate bit-widths.

    Raises:
      ValueError: naming unknown and missing layers, or the first bit-width
        that is not a candidate.
    """
    names = list(layers)
    known = set(names)
    unknown = [layer for layer in self if layer not in known]
    missing = [layer for layer in names if layer not in self]
    if unknown or missing:
      raise ValueError(
        f"allocation must name exactly the layers {names}, but has unknown "
        f"layers {unknown}, missing layers {missing}"
      )
    for layer, b in self.items():
      if b not in bits:
        raise ValueError(
          f"bits[{layer!r}] must be one of {tuple(bits)}, got {b}"
        )

  def index(self, bits: Sequence[int]) -> np.ndarray:
    """Returns positions among candidate bit-widths, int64 [L].

    Raises:
      ValueError: if a bit-width is not a candidate.
    """
    self.check(self, bits)
    return np.array([list(bits).index(b) for b in self.values()], np.int64)

  @property
  def mean_bits(self) -> float:
    """Mean over the layers, not weighted by their parameters."""
    return sum(self.values()) / len(self) if self else 0.0

  def table(self, **columns: Mapping[str, Any]) -> str:
    """Returns a text table, a line per layer.

    Args:
      **columns: further columns by title, each {layer: value}, such as
        `parameters={"conv": 432}`; where a layer has none the cell stays
        empty.
    """
    heads = ["layer", "bits", *columns]
    rows = [
      [layer, str(b), *(str(c.get(layer, "")) for c in columns.values())]
      for layer, b in self.items()
    ]
    widths = [max(map(len, cells)) for cells in zip(heads, *rows, strict=True)]
    return "\n".join(
      "  ".join(
        [row[0].ljust(widths[0])]
        + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
      ).rstrip()
      for row in [heads, *rows]
    )

  def __getitem__(self, layer: str) -> int:
    return self._bits[layer]

  def __iter__(self) -> Iterator[str]:
    return iter(self._bits)

  def __len__(self) -> int:
    return len(self._bits)

  def __hash__(self) -> int:
    return hash(frozenset(self.items()))

  def __repr__(self) -> str:
    return f"Allocation({self._bits!r})"

  def __str__(self) -> str:
    return self.table()


def read_assignment(
  given: str, *, allowed: str = "a bit-width"
) -> int | Allocation:
  """Returns what a flag --bits says: a bit-width, or an allocation's file.

  Args:
    given: digits, or a path.
    allowed: what the flag can be besides a path, for an error.

  Raises:
    ValueError: if it is neither, or the file holds anything else.

  >>> read_assignment("4")
  4
  >>> read_assignment("")
  Traceback (most recent call last):
  ValueError: --bits must be a bit-width or a file of an allocation, got ''
  """
  if given.isdecimal():
    return int(given)
  path = files.expand(given)
  if not given or not os.path.exists(path):
    raise ValueError(
      f"--bits must be {allowed} or a file of an allocation, got {given!r}"
    )
  return Allocation.load(path)
