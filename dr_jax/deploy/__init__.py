"""One integer file for every bit-width."""

from dr_jax.deploy.artifact import ArtifactError, load, read, save, sizes

__all__ = ["ArtifactError", "load", "read", "save", "sizes"]
