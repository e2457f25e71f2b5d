"""One integer file for every bit-width."""

from dr_jax.deploy.artifact import Artifact, ArtifactError, load, open, save
from dr_jax.deploy.choices import Choice
from dr_jax.deploy.decoder import Decoder
from dr_jax.deploy.export import (
  export_onnx,
  export_onnx_switchable,
  export_safetensors,
  export_stablehlo,
)
from dr_jax.deploy.switchable import Switchable

__all__ = [
  "Artifact",
  "ArtifactError",
  "Choice",
  "Decoder",
  "Switchable",
  "export_onnx",
  "export_onnx_switchable",
  "export_safetensors",
  "export_stablehlo",
  "load",
  "open",
  "save",
]
