"""Curvature of a loss: Hessian-vector products and traces per layer."""

from dr_jax.hessian.files import load, save
from dr_jax.hessian.hvp import MODES, hvp, quadratic_forms
from dr_jax.hessian.trace import TraceEstimate, sensitivity, trace

__all__ = [
  "MODES",
  "TraceEstimate",
  "hvp",
  "load",
  "quadratic_forms",
  "save",
  "sensitivity",
  "trace",
]
