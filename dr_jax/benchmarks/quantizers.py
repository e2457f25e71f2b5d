"""Speed of every quantizer, compared with a copy of as many bytes.

  python -m dr_jax.benchmarks.quantizers [--method=lsq,lsq_activation]
      [--weight=3x3x512x512] [--activation=128x32x32x16] [--rounds=21]

Two programs each, as in a training step, where other layers lie between them:

  forward    reads x, writes x_hat
  backward   reads x and the gradient of x_hat; writes those of x and of the
             parameters (and computes the codes again: none are kept)

Parameters are few, so that five times the bytes of x are what has to move. The
copies move exactly the same: -x, and the sum of two arrays. Results go to
buffers that exist, as in a step; whatever else a program moves or computes is
in the ratios. One bit-width of the method's default ones, a Python int.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dr_jax import quant
from dr_jax.benchmarks.rows import Rows
from dr_jax.benchmarks.timing import in_turn, ratio
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command, compilation

FLAGS = flags.FLAGS

# Arrays of x's size that a pass reads or writes.
_FORWARD, _BACKWARD = 2, 3
# Weights that no quantizer touches.
_NONE = ("float_weight",)


class Measured(NamedTuple):
  """One quantizer at one bit-width; seconds have one entry for each round.

  Attributes:
    size: bytes of x.
    forward, backward: seconds of its passes.
    copies: seconds of the two copies, [2, rounds].
  """

  size: int
  forward: np.ndarray
  backward: np.ndarray
  copies: np.ndarray

  def speed(self) -> float:
    """Bytes per second of what both passes have to move, the median."""
    moved = (_FORWARD + _BACKWARD) * self.size
    return moved / float(np.median(self.forward + self.backward))

  def ratios(self) -> tuple[float, float, float]:
    """How many copies forward, backward, and both passes take."""
    return (
      ratio(self.forward, self.copies[0]),
      ratio(self.backward, self.copies[1]),
      ratio(self.forward + self.backward, self.copies.sum(0)),
    )


def define_flags() -> None:
  """Defines what the command takes; some names are also those of others."""
  flags.DEFINE_list("method", [], "Quantizers; by default all.")
  flags.DEFINE_string("weight", "3x3x512x512", "Shape of weights.")
  flags.DEFINE_string("activation", "128x32x32x16", "Shape of activations.")
  flags.DEFINE_integer(
    "bits", 4, "Bit-width, for the methods that have it by default."
  )
  flags.DEFINE_integer("rounds", 21, "Timed rounds.", lower_bound=1)


def main() -> None:
  """Prints a row for each quantizer."""
  names = FLAGS.method or [name for name in quant.NAMES if name not in _NONE]
  quantizers = [quant.get(name) for name in names]
  weight = shape_of("weight", FLAGS.weight)
  activation = shape_of("activation", FLAGS.activation)
  rows = Rows(
    f"weights {FLAGS.weight}, activations {FLAGS.activation}, float32",
    (
      "quantizer",
      "bits",
      "forward ms",
      "forward of copy",
      "backward ms",
      "backward of copy",
      "GB/s of both",
      "both of copies",
    ),
  )
  for quantizer in quantizers:
    weights = isinstance(quantizer, quant.WeightQuantizer)
    shape = weight if weights else activation
    bits = FLAGS.bits if FLAGS.bits in quantizer.bits else quantizer.bits[-1]
    found = measure(quantizer, bits, shape, FLAGS.rounds)
    forward, backward, both = found.ratios()
    rows.add(
      quantizer.name,
      str(bits),
      f"{1e3 * np.median(found.forward):.3f}",
      f"{forward:.2f}",
      f"{1e3 * np.median(found.backward):.3f}",
      f"{backward:.2f}",
      f"{found.speed() / 1e9:.1f}",
      f"{both:.2f}",
    )
  rows.end()
  print(environment())


def measure(
  quantizer: quant.WeightQuantizer | quant.ActivationQuantizer,
  bits: int,
  shape: tuple[int, ...],
  rounds: int,
) -> Measured:
  """Times both passes of a quantizer, and copies, in turn.

  Args:
    quantizer: any; activations are those after a ReLU, half of them 0.
    bits: one of its bit-widths.
    shape: of the weight [..., c_in, c_out], or of the activations.
    rounds: how often each is timed.
  """
  x, g = jax.random.normal(jax.random.key(0), (2, *shape), jnp.float32)
  if isinstance(quantizer, quant.ActivationQuantizer):
    x, quantizer = jnp.maximum(x, 0), quantizer.with_sign(False)
  params, index = quantizer.init(x), quantizer.bits.index(bits)

  def forward(params, x):
    return quantizer.fake_quantize(params, x, index)

  def backward(params, x, g):
    return jax.vjp(forward, params, x)[1](g)[::-1]

  calls = [
    _into(lambda x: (-x,), x),
    _into(lambda params, x: (forward(params, x),), params, x),
    _into(lambda x, g: (x + g,), x, g),
    _into(backward, params, x, g),
  ]
  for call in calls:
    call()
  seconds = in_turn(calls, range(rounds))
  return Measured(x.nbytes, seconds[1], seconds[3], seconds[::2])


def _into(program: Callable[..., Any], *arguments) -> Callable[[], Any]:
  """A call whose first result, shaped like x, is where the last call's was."""
  run = compilation.jit(
    lambda buffer, *arguments: program(*arguments),
    donate_argnums=0,
    keep_unused=True,
  )
  buffer = [jnp.zeros_like(arguments[-1])]

  def call():
    buffer[0], *rest = run(buffer[0], *arguments)
    return buffer[0], rest

  return call


def shape_of(name: str, text: str) -> tuple[int, ...]:
  """Returns a shape that is written like 3x3x64x64.

  Raises:
    ValueError: for anything else, and fewer than two axes.
  """
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
    raise ValueError(f"{name} must be like 3x3x64x64, got {text!r}")
  return tuple(map(int, text.split("x")))


if __name__ == "__main__":
  define_flags()
  command.start(main)
