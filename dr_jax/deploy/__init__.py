"""One integer file for every bit-width."""

from dr_jax.deploy.artifact import (
  ArtifactError,
  layer_sizes,
  load,
  read,
  save,
  size,
  sizes,
)

__all__ = [
  "ArtifactError",
  "layer_sizes",
  "load",
  "read",
  "save",
  "size",
  "sizes",
]
