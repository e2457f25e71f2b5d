"""One integer file for every bit-width."""

from dr_jax.deploy.artifact import Artifact, ArtifactError, load, open
from dr_jax.deploy.writer import save

__all__ = ["Artifact", "ArtifactError", "load", "open", "save"]
