"""Training at several bit-widths: steps, ALRS, and the loop around them."""

from dr_jax.train import hasb
from dr_jax.train.distill import SCHEMES as DISTILLATIONS
from dr_jax.train.distill import cross_entropy
from dr_jax.train.evaluate import Score, make_evaluate
from dr_jax.train.loop import InterruptedRun, Loop, NonFiniteError
from dr_jax.train.methods import CURRICULA, RECIPES, Curriculum, Phase, Recipe
from dr_jax.train.optimizer import NAMES as OPTIMIZERS
from dr_jax.train.optimizer import make_optimizer
from dr_jax.train.sampling import SAMPLINGS, Sampling
from dr_jax.train.state import TrainState, collect, init_state, place
from dr_jax.train.step import SCHEDULES, VECTORIZE, make_step, resolve_vectorize

__all__ = [
  "CURRICULA",
  "Curriculum",
  "DISTILLATIONS",
  "OPTIMIZERS",
  "RECIPES",
  "SAMPLINGS",
  "SCHEDULES",
  "VECTORIZE",
  "InterruptedRun",
  "Loop",
  "NonFiniteError",
  "Phase",
  "Recipe",
  "Sampling",
  "Score",
  "TrainState",
  "collect",
  "cross_entropy",
  "hasb",
  "init_state",
  "make_evaluate",
  "make_step",
  "make_optimizer",
  "place",
  "resolve_vectorize",
]
