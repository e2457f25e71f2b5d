"""Whose bits each module of a network follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dr_jax.nn.attention import Operand
from dr_jax.nn.calibrate import Call
from dr_jax.nn.recorder import stack_of


class Followed(NamedTuple):
  """Whose bits a module follows: number of the first layer, axes of a stack."""

  order: int
  stack: tuple[int, ...]

  @property
  def last(self) -> Followed:
    """The last layer of the stack."""
    return Followed(self.order + math.prod(self.stack) - 1, ())


def followed_layers(
  calls: Mapping[str, Call], quantized: Sequence[str]
) -> dict[str, Followed]:
  """The numbers of the quantized layers whose bits each module follows.

  A quantized layer follows its own; a norm, and an operand of a product, those
  of the layer whose output it has, else of the quantized layer that was called
  last, else the first; of a stack that it is outside of, the last one's.

  Raises:
    ValueError: if an operand in a stack follows a layer that is outside of it.
  """
  own: dict[str, Followed] = {}
  order = 0
  for name in quantized:
    own[name] = Followed(order, calls[name].stack)
    order += math.prod(stack_of(calls[name].module))
  follows: dict[str, Followed] = {}
  last = own[quantized[0]]
  for name, call in calls.items():
    if name in own:
      last = follows[name] = own[name]
    else:
      follows[name] = own[call.source] if call.source in own else last
      if not call.stack:
        follows[name] = follows[name].last
      elif isinstance(call.module, Operand):
        _check_stack(name, call, follows[name])
  return follows


def _check_stack(name, call, followed):
  if call.stack != followed.stack:
    raise ValueError(
      f"products: {name} is in a stack {call.stack} of layers and must follow "
      "one that is quantized there, but follows a layer outside; skip its "
      "product, or quantize a layer of the stack before it"
    )
