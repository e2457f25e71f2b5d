"""The bit-widths of a training step's passes, and their order.

A sampling is a list of passes. Each is a position in the candidate
bit-widths: fixed (a Python int, whose constants fold), drawn for the whole
network (an int32 scalar), or drawn for every layer (int32 [layers]). The first
pass is always the highest of the step, so that it can teach the others.
Those that have a name:

  all       every bit-width, high to low (Double Rounding, AdaBits, ...)
  sandwich  highest, one between, lowest (MultiQuant)
  pair      highest and one lower (multi-resolution term quantization)
  random    one for the whole network (Bit-Mixer, stages 1 and 2)
  mixed     one for every layer (Bit-Mixer, stage 3)

Sensitivity-aware sampling is in `train.hasb`; there some layers of a pass have
other bits than its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

Index = int | jax.Array


class Sampling(NamedTuple):
  """One way to choose bit-widths.

  Attributes:
    labels: `labels(bits) -> tuple`, what each pass trains: a bit-width, or a
      word where it is drawn.
    draw: `draw(key, candidates, layers, step) -> list` of indices, one per
      pass; `candidates` and `layers` are numbers of bit-widths and layers,
      `step` counts batches from 0.
  """

  labels: Callable[[tuple[int, ...]], tuple[int | str, ...]]
  draw: Callable[[jax.Array, int, int, jax.Array], list[Index]]


def _all(
  key: jax.Array, candidates: int, layers: int, step: jax.Array
) -> list[Index]:
  del key, layers, step
  return list(range(candidates))


def _sandwich(
  key: jax.Array, candidates: int, layers: int, step: jax.Array
) -> list[Index]:
  del layers, step
  if candidates < 3:
    return list(range(candidates))
  middle = jax.random.randint(key, (), 1, candidates - 1)
  return [0, middle, candidates - 1]


def _sandwich_labels(bits):
  return bits if len(bits) < 3 else (bits[0], "random", bits[-1])


def _pair(
  key: jax.Array, candidates: int, layers: int, step: jax.Array
) -> list[Index]:
  del layers, step
  if candidates < 3:
    return list(range(candidates))
  return [0, jax.random.randint(key, (), 1, candidates)]


def _pair_labels(bits):
  return bits if len(bits) < 3 else (bits[0], "random")


def _random(
  key: jax.Array, candidates: int, layers: int, step: jax.Array
) -> list[Index]:
  del layers, step
  return [jax.random.randint(key, (), 0, candidates)]


def _mixed(
  key: jax.Array, candidates: int, layers: int, step: jax.Array
) -> list[Index]:
  del step
  return [jax.random.randint(key, (layers,), 0, candidates)]


SAMPLINGS = {
  "all": Sampling(tuple, _all),
  "sandwich": Sampling(_sandwich_labels, _sandwich),
  "pair": Sampling(_pair_labels, _pair),
  "random": Sampling(lambda bits: ("random",), _random),
  "mixed": Sampling(lambda bits: ("mixed",), _mixed),
}


def get(name: str | Sampling) -> Sampling:
  """Returns the sampling of that name; a Sampling stands for itself.

  Raises:
    ValueError: for an unknown name.
  """
  if isinstance(name, Sampling):
    return name
  if name not in SAMPLINGS:
    known = ", ".join(SAMPLINGS)
    raise ValueError(f"sampling must be one of {known}, got {name!r}")
  return SAMPLINGS[name]
