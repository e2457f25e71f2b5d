"""Deployed networks as ONNX files with integer weights."""

from dr_jax.deploy.onnx.export import export_onnx

__all__ = ["export_onnx"]
