"""What of an artifact was not read yet, and reads it one module at a time.

A layer's codes without their last planes are its codes rounded down. Planes
that are read later fill in zeros, and what they add changes no bit-width that
the first ones served. So a module can be replaced while others are not yet, and
memory holds one module twice, never a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from dr_jax.deploy.artifact import Artifact
from dr_jax.deploy.artifact.layout import CHECKSUMS, Piece, plane_pieces
from dr_jax.deploy.artifact.reader import errors_of
from dr_jax.deploy.artifact.verify import check_norm_values, check_ranges

Arrays = dict[str, jax.Array]


class Missing:
  """The pieces of an artifact that were not read.

  It knows where everything lies, and holds nothing of what was read.
  """

  def __init__(self, artifact: Artifact):
    self._weight = artifact.weight
    self._shapes = {n: s.shape for n, s in artifact.parts.layers.items()}
    self._held = set(artifact.store.pieces)
    store = artifact.store
    checksums = {n: a for n, a in store.tensors.items() if n == CHECKSUMS}
    self._store = dataclasses.replace(store, tensors=checksums, pieces={})

  def of(self, bits: Mapping[str, int]) -> dict[str, list[Piece]]:
    """Returns what an assignment needs and was not read, by layer or norm."""
    found: dict[str, list[Piece]] = {}
    for piece in self._store.layout.pieces_for(bits):
      if piece not in self._held:
        found.setdefault(piece[1], []).append(piece)
    return found

  def read(self, name: str, pieces: list[Piece], arrays: Arrays) -> Arrays:
    """Reads pieces of one layer or norm.

    Args:
      name: of the layer or norm.
      pieces: of it, from `of`.
      arrays: what the layer or norm has now: "codes", or "gain" and "offset".

    Returns:
      The same arrays with what was read.

    Raises:
      ArtifactError: if they are damaged; they are as missing as before.
    """
    read = self._store.with_pieces(pieces).pieces
    with errors_of(self._store.path):
      join = self._codes if name in self._shapes else self._rows
      joined = join(name, read, arrays)
    self._held |= set(pieces)
    return {key: jax.device_put(value) for key, value in joined.items()}

  def _codes(self, name, read, arrays):
    keys = plane_pieces(name, self._weight.bits[0])
    numbers = [number for number, key in enumerate(keys) if key in read]
    size = read[keys[numbers[0]]].size
    planes = np.zeros((numbers[-1] + 1, size), np.uint8)
    for number in numbers:
      planes[number] = read[keys[number]]
    storage = self._weight.storage
    added = storage.unpack({"codes": planes}, self._shapes[name])["codes"]
    codes = np.asarray(arrays["codes"]) | np.asarray(added)
    check_ranges(self._weight, {"codes": codes}, len(planes))
    return {"codes": codes}

  def _rows(self, name, read, arrays):
    both = np.stack([np.asarray(arrays[key]) for key in ("gain", "offset")])
    for row, key in enumerate(self._store.layout.row_pieces(name)):
      if key in read:
        both[:, row] = read[key]
        check_norm_values(name, row, both[:, row])
    return {"gain": both[0], "offset": both[1]}
