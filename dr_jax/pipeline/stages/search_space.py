"""The search problem that a configuration describes.

A budget is given as a mean bit-width, layers by name. Searches
(`dr_jax.search`) know costs and positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from dr_jax import allocate, nn
from dr_jax import search as searches
from dr_jax.allocate.latency_table import SCHEMA, LatencyTable
from dr_jax.config import ConfigError, SearchConfig
from dr_jax.runtime import files


def problem(
  config: SearchConfig, table: nn.LayerTable, bits: tuple[int, ...]
) -> searches.Problem:
  """Returns the problem of a configuration: layers, costs, ties, pins.

  Args:
    config: of the search.
    table: `nn.layer_table` of the quantized network.
    bits: candidate bit-widths, highest first.

  Raises:
    ConfigError: naming the field.
  """
  names = [row.name for row in table]
  return searches.Problem(
    table=table,
    bits=bits,
    costs=_costs(config, table, bits),
    ties=tuple(tuple(map(_position(names, "ties"), g)) for g in config.ties),
    pinned=_pinned(config.pinned, names, bits),
    metric=config.metric,
  )


def _costs(config, table, bits):
  costs = {
    "stored_bits": allocate.stored_bits([r.parameters for r in table], bits),
    "bops": allocate.bops([r.macs for r in table], bits),
    "sum_bits": allocate.mean_bits(len(table), bits),
  }
  if config.latency:
    measured = latency_table(config.latency)
    try:
      costs["latency"] = allocate.latency(
        measured, [r.name for r in table], bits
      )
    except ValueError as error:
      raise ConfigError(f"search.latency={config.latency!r}: {error}") from None
  return costs


def latency_table(path: str) -> dict[str, dict[int, float]]:
  """Reads {layer: {bits: seconds}}, as it is or in an `allocate.LatencyTable`.

  Raises:
    ConfigError: if the file is missing or holds something else.
  """
  plain = {...: {...: float}}
  try:
    value = files.read_json(path, (SCHEMA, plain))
    if "layers_ms" in value:
      return LatencyTable.from_json(value).layer_seconds
    return {
      layer: {int(b): float(s) for b, s in row.items()}
      for layer, row in value.items()
    }
  except OSError as error:
    raise ConfigError(f"search.latency={path!r}: {error.strerror}") from None
  except ValueError as error:
    raise ConfigError(
      "search.latency must be a file of dr_jax.benchmarks.latency, or "
      f"{{layer: {{bits: seconds}}}} in JSON: {error}"
    ) from None


def budgets(
  problem: searches.Problem, names: Sequence[str], mean: float
) -> dict[str, int]:
  """Returns what a network costs with a mean bit-width everywhere, by cost.

  Between candidates, costs are interpolated: exactly m for stored bits.
  """
  m = Fraction(str(mean))
  limits = {}
  for name in names:
    totals = [int(column.sum()) for column in problem.costs[name].T]
    limits[name] = math.floor(_interpolated(problem.bits, totals, m))
  return limits


def _interpolated(bits, totals, m):
  """The total at m bits: linear between candidates and beyond them."""
  if len(bits) == 1:
    return Fraction(totals[0]) * m / bits[0]
  position = sum(b >= m for b in bits) - 1
  position = min(max(position, 0), len(bits) - 2)
  high, low = bits[position], bits[position + 1]
  fraction = (m - low) / (high - low)
  return totals[position + 1] + fraction * (
    totals[position] - totals[position + 1]
  )


def _position(names, field):
  def position(name):
    if name not in names:
      raise ConfigError(
        f"search.{field} must be of the quantized layers {', '.join(names)}, "
        f"got {name!r}"
      )
    return names.index(name)

  return position


def _pinned(pinned, names, bits):
  for name, b in pinned.items():
    _position(names, "pinned")(name)
    if b not in bits:
      raise ConfigError(
        f"search.pinned.{name} must be one of {', '.join(map(str, bits))}, got "
        f"{b!r}"
      )
  return {names.index(name): bits.index(b) for name, b in pinned.items()}
