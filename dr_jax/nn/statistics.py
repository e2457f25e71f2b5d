"""Statistics of the inputs of a layer, and the parameters they start from."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax import quant

# Inputs of a layer that a search for the least error looks at: at most so many,
# or so many where there are fewer.
_SEARCHED, _FEW = 2**16, 2**12


class Statistics(NamedTuple):
  """What batches show of a layer's inputs; of a stack, with its axes.

  Attributes:
    finite: whether all are finite.
    low, high: the smallest and the largest.
    params: initial parameters by sign, of signs that the inputs can have.
  """

  finite: Any
  low: Any
  high: Any
  params: Any

  def joined(self, other: Statistics) -> Statistics:
    """Those of both; the sum of the parameters."""
    mine, others = of_common_signs([self.params, other.params])
    return Statistics(
      self.finite & other.finite,
      np.minimum(self.low, other.low),
      np.maximum(self.high, other.high),
      jax.tree.map(np.add, mine, others),
    )

  def mean_of(self, count: int) -> Statistics:
    """With the parameters divided by a number of batches or calls."""
    if count == 1:
      return self
    return self._replace(params=jax.tree.map(lambda p: p / count, self.params))


def of_common_signs(params: list[Any]) -> list[Any]:
  """Parameters by sign, of the signs that all of them have."""
  common = set.intersection(*map(set, params))
  return [{sign: each[sign] for sign in sorted(common)} for each in params]


# Called outside of a program, one for all layers with inputs of a size.
@functools.partial(jax.jit, static_argnums=(1, 2))
def statistics_of(xs: Any, activation: Any, init: str) -> Statistics:
  """Statistics of inputs; for "mse", what `searched_params` starts from."""
  # A layer that is called several times has one scale for all its inputs. To
  # touch them finds those that belong to an inner trace, so do it always.
  x = jnp.concatenate([x.reshape(-1).astype(jnp.float32) for x in xs])
  params = {}
  if activation is not None:
    if init == "mse":
      params = x[:: -(-x.size // _SEARCHED)]
    else:
      params = {
        signed: quant.fit(quantizer, x, init)
        for signed, quantizer in _of_signs(activation).items()
      }
  # Not (x < 0).any(): behind a ReLU, XLA folds that constant at compile time,
  # element by element.
  low, high = x.min(), x.max()
  return Statistics(jnp.isfinite(low) & jnp.isfinite(high), low, high, params)


def searched_params(found: Statistics, activation: Any) -> Statistics:
  """Replaces the inputs to search by the parameters of least error.

  Outside of the program that found them: the search takes long to compile, and
  all layers share it.
  """
  if isinstance(found.params, dict):
    return found
  signs = _of_signs(activation)
  if len(signs) == 2 and found.low < 0:
    signs = {True: signs[True]}
  # Inputs of few elements are repeated, so that few sizes have a program each.
  size = _FEW if found.params.size <= _FEW else _SEARCHED
  x = np.resize(np.asarray(found.params), size)
  params = {sign: _fitted(by, x) for sign, by in signs.items()}
  return found._replace(params=params)


@functools.partial(jax.jit, static_argnums=0)
def _fitted(quantizer, x):
  return quant.fit(quantizer, x, "mse")


@functools.lru_cache(maxsize=64)
def _of_signs(activation):
  """An input quantizer at the signs that it can have."""
  found = {}
  for signed in (False, True):
    try:
      found[signed] = activation.with_sign(signed)
    except ValueError:
      continue  # nn.quantize raises where a layer needs this sign
  return found
