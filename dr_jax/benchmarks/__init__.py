"""Measurements: python -m dr_jax.benchmarks.NAME."""
