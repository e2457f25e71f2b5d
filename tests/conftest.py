"""Strict numerics for every test: dtype promotion, ranks, and warnings."""

import os

# Four CPU devices, before jax starts: sharding tests need a mesh.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_numerics():
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield
