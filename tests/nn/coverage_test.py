"""What of a network is quantized, and the reasons for the rest."""

import jax.numpy as jnp
import pytest
from flax import nnx

from dr_jax import nn, quant


class Doubled(nnx.Linear):
  def __call__(self, x):
    return 2 * super().__call__(x)


class Mixed(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.first = nnx.Linear(4, 6, rngs=rngs)
    self.norm = nnx.LayerNorm(6, rngs=rngs)
    self.own = Doubled(6, 6, rngs=rngs)
    self.normalized = nnx.SpectralNorm(nnx.Linear(6, 6, rngs=rngs), rngs=rngs)
    self.last = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    return self.last(self.normalized(self.own(self.norm(self.first(x)))))


def test_every_layer_with_a_kernel_is_quantized_or_says_why_not():
  model, x = Mixed(), jnp.ones((2, 5, 4))
  model.eval()
  with pytest.warns(UserWarning, match="stay as they are"):
    network = nn.quantize(
      model, weight=quant.double_rounding((8, 4)), sample=x, skip="last"
    )
  table = nn.coverage(model, network, x)
  assert [(row.name, row.macs, row.reason) for row in table] == [
    ("first", 5 * 24, ""),
    ("last", 5 * 18, "skipped"),
    ("normalized/layer_instance", None, "is in SpectralNorm"),
    ("own", None, "overrides __call__"),
  ]
  assert table.macs == 24 / 42
  assert table.parameters == 24 / (24 + 18 + 36 + 36)
  assert "57.1 % of multiply-accumulates" in str(table)
