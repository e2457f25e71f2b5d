"""Multi-precision networks of Flax Linen modules."""

from dr_jax.linen.convert import from_linen, quantize
from dr_jax.linen.network import split, update

__all__ = ["from_linen", "quantize", "split", "update"]
