"""Training at several bit-widths: steps, ALRS, and the loop around them."""

from dr_jax.train import hasb
from dr_jax.train.curricula import CURRICULA, Curriculum, Phase
from dr_jax.train.distill import SCHEMES as DISTILLATIONS
from dr_jax.train.distill import cross_entropy
from dr_jax.train.evaluate import Score, make_evaluate
from dr_jax.train.loop import InterruptedRun, Loop, NonFiniteError
from dr_jax.train.optimizer import NAMES as OPTIMIZERS
from dr_jax.train.optimizer import cosine_schedule, make_optimizer
from dr_jax.train.residuals import residual_bytes
from dr_jax.train.sampling import SAMPLINGS, Sampling
from dr_jax.train.schedules import (
  SCHEDULES,
  VECTORIZE,
  check_vectorize,
  passes_at_once,
  resolve_vectorize,
)
from dr_jax.train.state import TrainState, gather, shard_state
from dr_jax.train.trainer import Trainer, make_trainer, pass_labels

__all__ = [
  "CURRICULA",
  "Curriculum",
  "DISTILLATIONS",
  "OPTIMIZERS",
  "SAMPLINGS",
  "SCHEDULES",
  "VECTORIZE",
  "InterruptedRun",
  "Loop",
  "NonFiniteError",
  "Phase",
  "Sampling",
  "Score",
  "TrainState",
  "Trainer",
  "check_vectorize",
  "gather",
  "cosine_schedule",
  "cross_entropy",
  "hasb",
  "make_evaluate",
  "make_trainer",
  "make_optimizer",
  "pass_labels",
  "passes_at_once",
  "residual_bytes",
  "resolve_vectorize",
  "shard_state",
]
