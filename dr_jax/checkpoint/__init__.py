"""Checkpoints that are complete, verified, or absent."""

from dr_jax.checkpoint.checkpoints import (
  CheckpointError,
  Checkpoints,
  disk_bytes,
)

__all__ = ["CheckpointError", "Checkpoints", "disk_bytes"]
