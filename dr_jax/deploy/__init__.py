"""One integer file for every bit-width."""

from dr_jax.deploy.artifact import Artifact, load, open
from dr_jax.deploy.choices import Choice
from dr_jax.deploy.onnx import export_onnx, export_onnx_switchable
from dr_jax.deploy.plain import export_safetensors
from dr_jax.deploy.reader import ArtifactError
from dr_jax.deploy.stablehlo import export_stablehlo
from dr_jax.deploy.switchable import Switchable
from dr_jax.deploy.writer import save

__all__ = [
  "Artifact",
  "ArtifactError",
  "Choice",
  "Switchable",
  "export_onnx",
  "export_onnx_switchable",
  "export_safetensors",
  "export_stablehlo",
  "load",
  "open",
  "save",
]
