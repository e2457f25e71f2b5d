"""Data sets and the order in which a run sees them."""

from dr_jax.data.pipeline import batches, epoch
from dr_jax.data.sources import ArraySource, Dataset, Source, hold_out, load

__all__ = [
  "ArraySource",
  "Dataset",
  "Source",
  "batches",
  "epoch",
  "hold_out",
  "load",
]
