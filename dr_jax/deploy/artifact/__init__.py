"""The integer artifact: its format, writing, reading, and what is verified."""

from dr_jax.deploy.artifact.opened import Artifact, load, open
from dr_jax.deploy.artifact.reader import ArtifactError
from dr_jax.deploy.artifact.writer import save

__all__ = ["Artifact", "ArtifactError", "load", "open", "save"]
