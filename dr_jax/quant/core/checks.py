"""Checks of arguments, which raise before XLA would clamp or cast them.

A message starts with the argument's name, says what it must be, and ends with
what was given.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int

ROUNDINGS = ("half_even", "half_up", "floor")

# Position in the candidate bit-widths.
Index: TypeAlias = int | jax.Array


def check_bits(
  bits: Sequence[int], *, lowest: int = 2, highest: int = 8, method: str = ""
) -> tuple[int, ...]:
  """Returns candidate bit-widths as a tuple of ints.

  Args:
    bits: candidates, highest first.
    lowest, highest: bounds of a bit-width, both included.
    method: whose bit-widths they are, for the message.

  Raises:
    ValueError: if `bits` is empty, not strictly descending, or has an entry
      that is not an integer or is outside [lowest, highest].

  >>> check_bits([8, 4])
  (8, 4)
  """
  constraint = f"integers from {highest} down to {lowest}, highest first"
  if lowest == highest:
    constraint = f"({lowest},)"
  whose = f" of {method}" if method else ""
  message = f"bits{whose} must be {constraint}, got {bits!r}"
  try:
    checked = tuple(operator.index(b) for b in bits)
  except TypeError:
    raise ValueError(message) from None
  descending = all(a > b for a, b in zip(checked, checked[1:], strict=False))
  inside = all(lowest <= b <= highest for b in checked)
  if not checked or not descending or not inside:
    raise ValueError(message)
  return checked


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
  """Raises ValueError unless a value is one of the choices, of that type.

  >>> one_of("rounding", "floor", ROUNDINGS)
  """
  # 1 equals True, and 1.0 equals 1.
  if not any(type(value) is type(c) and value == c for c in choices):
    known = ", ".join(map(repr, choices))
    raise ValueError(f"{name} must be one of {known}, got {value!r}")


def check_rounding(rounding: str) -> None:
  """Raises ValueError for an unknown tie rule."""
  one_of("rounding", rounding, ROUNDINGS)


def check_integer(name: str, value: Any, lowest: int, highest: int) -> int:
  """Returns a Python integer within [lowest, highest].

  Raises:
    ValueError: for anything else, booleans and floats included.
  """
  try:
    number = None if isinstance(value, bool) else operator.index(value)
  except TypeError:
    number = None
  if number is None or not lowest <= number <= highest:
    raise ValueError(
      f"{name} must be an integer in {lowest}..{highest}, got {value!r}"
    )
  return number


def check_index(index: Index, bits: tuple[int, ...]) -> None:
  """Rejects a Python index outside the candidates, which XLA would clamp."""
  if isinstance(index, int | np.integer) and not 0 <= index < len(bits):
    raise ValueError(
      f"index must be in 0..{len(bits) - 1}, a position in bits={bits}, got "
      f"{index}"
    )


def check_sign(signed: bool | None) -> None:
  """Raises ValueError if the sign of an activation is undecided."""
  if signed is None:
    raise ValueError(
      "signed must be True or False, got None: nn.quantize decides it by "
      "calibration, with_sign(True) by hand"
    )


def check_finite(name: str, x: Float[Array, "..."]) -> None:
  """Raises ValueError for NaN or infinite values; under a trace, nothing."""
  if isinstance(x, jax.core.Tracer):
    return
  # A weight that a jitted function closes over is concrete: look at it now.
  with jax.ensure_compile_time_eval():
    bad = x.size - int(jnp.isfinite(x).sum())
  if bad:
    raise ValueError(
      f"{name} must be finite, but {bad} of {x.size} values are NaN or infinite"
    )


def check_codes(name: str, codes: Int[Array, "..."], bits: int) -> None:
  """Raises ValueError for codes of more bits; under a trace, nothing."""
  if isinstance(codes, jax.core.Tracer) or not codes.size:
    return
  lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  low, high = int(codes.min()), int(codes.max())
  if low < lowest or high > highest:
    raise ValueError(
      f"{name} must be in {lowest}..{highest}, of {bits} bits, got values in "
      f"{low}..{high}"
    )


def check_integers(name: str, codes: Int[Array, "..."]) -> Int[Array, "..."]:
  """Returns codes as an array; raises ValueError unless they are integers."""
  codes = jnp.asarray(codes)
  if not jnp.issubdtype(codes.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers, got dtype {codes.dtype}")
  return codes
