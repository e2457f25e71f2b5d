"""Hessian-Aware Stochastic Bit-switching: how a SuperNet trains mixed bits.

A step passes through every bit-width b, high to low. At each pass every layer
draws r ~ U[0, 1]: where r < sigma it takes its bits from its roulette, else b;
the weights and inputs of a layer share them. With t the layers' sensitivities
and t_m their mean, layer l's roulette is

  t_l <  t_m   every bit-width equally likely
  t_l >= t_m   bit-width b with probability b / sum(B)

so that sensitive layers meet high bit-widths more often. In epoch e of E
(counted from 0), sigma is 0 while the first epochs walk uniform bit-widths and
sigma0 (e + 1) / E from then on. arXiv 2502.01199, section 3.3.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.train.sampling import Index, Sampling

# Of the run, as the published 10 of 90 epochs.
WARMUP = 1 / 9


def roulette(sensitivity: Sequence[float], bits: tuple[int, ...]) -> np.ndarray:
  """Returns each layer's probabilities of the bit-widths, float32 [L, B].

  Args:
    sensitivity: [L], one per quantized layer; Hessian traces over numbers of
      parameters (`hessian.sensitivity`). Negative ones are below the mean as
      they are.
    bits: candidate bit-widths.

  Raises:
    ValueError: if there is no sensitivity, or one is not finite.

  >>> roulette([3.0, 1.0], (6, 2)).tolist()
  [[0.75, 0.25], [0.5, 0.5]]
  """
  values = np.asarray(sensitivity, np.float64)
  if values.ndim != 1 or not values.size:
    raise ValueError(
      "sensitivity must be one number for each quantized layer, got shape "
      f"{values.shape}"
    )
  for layer, value in enumerate(values):
    if not np.isfinite(value):
      raise ValueError(
        f"sensitivity of layer {layer} must be finite, got {value}"
      )
  by_bits = np.asarray(bits, np.float64) / sum(bits)
  equal = np.full(len(bits), 1 / len(bits))
  # Rounded once: a running sum can put the mean of equal layers above them.
  sensitive = values >= statistics.mean(values.tolist())
  return np.where(sensitive[:, None], by_bits, equal).astype(np.float32)


def sigma(
  epoch: jax.Array, epochs: int, *, start: float = 0.5, warmup: float = WARMUP
) -> jax.Array:
  """Fraction of the layers that draw their bits in an epoch, float32 scalar.

  Args:
    epoch: int32 scalar, counted from 0.
    epochs: length of the run.
    start: sigma0, which the last epoch reaches; it does not compound.
    warmup: fraction of the epochs, rounded to whole ones, with sigma 0.

  >>> float(sigma(jnp.int32(4), 10, start=0.5, warmup=0.2))
  0.25
  """
  fraction = start * (epoch.astype(jnp.float32) + 1) / epochs
  return jnp.where(epoch < round(warmup * epochs), 0, fraction)


def sampling(
  sensitivity: Sequence[float],
  bits: tuple[int, ...],
  *,
  steps: int,
  epochs: int,
  start: float = 0.5,
  warmup: float = WARMUP,
) -> Sampling:
  """Builds the sampling of a SuperNet's training, for `train.make_trainer`.

  Draws depend on the run's key, the step and the pass alone, so that a run is
  reproducible from its seed and resumable. Bits are traced: one program serves
  all assignments.

  Args:
    sensitivity: [L], as for `roulette`.
    bits: candidate bit-widths, highest first.
    steps, epochs: length of the run; epoch = step * epochs // steps.
    start, warmup: as for `sigma`.

  Raises:
    ValueError: as `roulette`; or if start is not in [0, 1], warmup not in
      [0, 1], or steps or epochs below 1.
  """
  for name, value in (("start", start), ("warmup", warmup)):
    if not 0 <= value <= 1:
      raise ValueError(f"{name} must be in 0..1, got {value!r}")
  for name, value in (("steps", steps), ("epochs", epochs)):
    if value < 1:
      raise ValueError(f"{name} must be >= 1, got {value!r}")
  probabilities = roulette(sensitivity, bits)

  def draw(
    key: jax.Array, candidates: int, layers: int, step: jax.Array
  ) -> list[Index]:
    if (layers, candidates) != probabilities.shape:
      raise ValueError(
        f"sensitivity and bits must be of {layers} layers and {candidates} "
        f"bit-widths, got {probabilities.shape[0]} layers and bits {bits}"
      )
    epoch = step * epochs // steps
    fraction = sigma(epoch, epochs, start=start, warmup=warmup)
    return [
      _draw_pass(
        jax.random.fold_in(key, number), number, probabilities, fraction
      )
      for number in range(candidates)
    ]

  return Sampling(labels=tuple, draw=draw)


def _draw_pass(key, own, probabilities, fraction):
  """Bits of all layers in the pass of the bit-width number `own`."""
  switch, spin = jax.random.split(key)
  layers = len(probabilities)
  switched = jax.random.uniform(switch, (layers,)) < fraction
  drawn = jax.random.categorical(spin, jnp.log(jnp.asarray(probabilities)))
  return jnp.where(switched, drawn.astype(jnp.int32), own)
