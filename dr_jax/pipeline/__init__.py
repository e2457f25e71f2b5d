"""Runs: a configuration, its stages, and what they leave in a directory."""

from dr_jax.pipeline.pipeline import environment, pretrain, run, summary

__all__ = ["environment", "pretrain", "run", "summary"]
