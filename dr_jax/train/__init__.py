"""Training at several bit-widths: steps, ALRS, and the loop around them."""

from dr_jax.train.evaluate import Score, make_evaluate
from dr_jax.train.loop import InterruptedRun, Loop, NonFiniteError
from dr_jax.train.optimizer import NAMES as OPTIMIZERS
from dr_jax.train.optimizer import make_optimizer
from dr_jax.train.step import (
  SCHEDULES,
  VECTORIZE,
  TrainState,
  cross_entropy,
  init_state,
  make_step,
  resolve_vectorize,
)

__all__ = [
  "OPTIMIZERS",
  "SCHEDULES",
  "VECTORIZE",
  "InterruptedRun",
  "Loop",
  "NonFiniteError",
  "Score",
  "TrainState",
  "cross_entropy",
  "init_state",
  "make_evaluate",
  "make_step",
  "make_optimizer",
  "resolve_vectorize",
]
