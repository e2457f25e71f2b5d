"""Runs: a configuration, its stages, and what they leave in a directory."""

from dr_jax.pipeline.pipeline import run
from dr_jax.pipeline.summary import environment

__all__ = ["environment", "run"]
