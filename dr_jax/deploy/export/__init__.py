"""Loaded networks as files that other programs run."""

from dr_jax.deploy.export.onnx import export_onnx, export_onnx_switchable
from dr_jax.deploy.export.plain import export_safetensors
from dr_jax.deploy.export.stablehlo import export_stablehlo

__all__ = [
  "export_onnx",
  "export_onnx_switchable",
  "export_safetensors",
  "export_stablehlo",
]
