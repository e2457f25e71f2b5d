"""Products with codes that are stored as bit-planes."""

from dr_jax.quant.planes.layout import (
  from_planes,
  matmul_bytes,
  planes_read,
  to_planes,
)
from dr_jax.quant.planes.product import matmul

__all__ = ["from_planes", "matmul", "matmul_bytes", "planes_read", "to_planes"]
