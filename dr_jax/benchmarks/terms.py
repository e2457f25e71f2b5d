"""Seconds to keep the largest terms of many weights, at one budget.

  python -m dr_jax.benchmarks.terms [--weights=25000000] [--rounds=5]

`quant.term_quantization` on one weight [c_in, 1024], under jit, for each of its
budgets: minimum and median of the rounds, without compilation.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dr_jax import quant
from dr_jax.benchmarks.rows import Rows
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command

_WEIGHTS = flags.DEFINE_integer("weights", 25_000_000, "Number of weights.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed calls of each budget.")


def main():
  w = jax.random.normal(jax.random.key(0), (_WEIGHTS.value // 1024, 1024))
  quantizer = quant.term_quantization()
  budgets = dict(quantizer.options)["budgets"]
  program = jax.jit(quantizer.fake_quantize)
  jax.block_until_ready(program({}, w, jnp.int32(0)))
  rows = Rows(
    f"{w.size:,} weights, groups of 8",
    ("terms per group", "median s", "min s"),
    left=0,
  )
  for index, budget in enumerate(budgets):
    seconds = []
    for _ in range(_ROUNDS.value):
      started = time.perf_counter()
      jax.block_until_ready(program({}, w, jnp.int32(index)))
      seconds.append(time.perf_counter() - started)
    rows.add(str(budget), f"{np.median(seconds):.2f}", f"{min(seconds):.2f}")
  rows.end()
  print(environment())


if __name__ == "__main__":
  command.start(main)
