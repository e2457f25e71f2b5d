"""Deployed networks as ONNX files with integer weights."""

from dr_jax.deploy.export.onnx.export import export_onnx
from dr_jax.deploy.export.onnx.switchable import export_onnx_switchable

__all__ = ["export_onnx", "export_onnx_switchable"]
