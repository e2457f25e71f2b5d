"""An allocation: which layer computes with how many bits.

A mapping {layer path: bits}, so that whatever takes such a mapping takes an
allocation. Its file is the same mapping as a JSON object.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dr_jax.allocate.problem import integer
from dr_jax.runtime import files


class Allocation(Mapping[str, int]):
  """Bit-widths by layer, immutable and hashable, in the order given.

  Equal to every mapping with the same entries, in any order.
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
        raise ValueError(f"layer={layer!r}: no path; allowed are strings")
      field, allowed = f"bits[{layer!r}]", "a positive integer"
      width = integer(field, b, allowed)
      if width < 1:
        raise ValueError(f"{field}={width}: too small; allowed is {allowed}")
      self._bits[layer] = width

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
      ValueError: if lengths differ, a path repeats or a position is none.
    """
    positions = np.asarray(index).tolist()
    if len(positions) != len(layers) or len(set(layers)) != len(layers):
      raise ValueError(
        f"index={positions}: {len(positions)} positions for {len(layers)} "
        f"layers, {len(set(layers))} different; allowed is one for each"
      )
    allowed = f"0..{len(bits) - 1}"
    for position in positions:
      if not 0 <= integer("index", position, allowed) < len(bits):
        raise ValueError(f"index={position}: no position; allowed is {allowed}")
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
      values = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
      raise ValueError("allocation: nested too deep") from None
    except json.JSONDecodeError as error:
      raise ValueError(
        f"allocation: no JSON ({error}); allowed is an object {{layer: bits}}"
      ) from None
    if not isinstance(values, dict):
      raise ValueError(
        f"allocation={text[:40]!r}: no object; allowed is {{layer: bits}}"
      )
    return cls(values)

  @classmethod
  def load(cls, path: str | os.PathLike) -> Allocation:
    """Reads a file that `save` wrote.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it holds anything else, naming the file.
    """
    try:
      return cls.from_json(pathlib.Path(path).read_bytes().decode())
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
        that is no candidate.
    """
    names = list(layers)
    unknown = [layer for layer in self if layer not in set(names)]
    missing = [layer for layer in names if layer not in self]
    if unknown or missing:
      raise ValueError(
        f"allocation: unknown layers {unknown}, missing layers {missing}; "
        f"allowed are exactly {names}"
      )
    for layer, b in self.items():
      if b not in bits:
        raise ValueError(
          f"bits[{layer!r}]={b}: no candidate; allowed are {tuple(bits)}"
        )

  def index(self, bits: Sequence[int]) -> np.ndarray:
    """Returns positions among candidate bit-widths, int64 [L].

    Raises:
      ValueError: if a bit-width is no candidate.
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"layer={twice!r}: appears twice; allowed is once")
  return values
