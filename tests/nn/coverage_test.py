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


class Unused(nnx.Module):
  """Holds a layer that it does not call, and reads the kernel of another."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.first = nnx.Linear(4, 4, rngs=rngs)
    self.read = nnx.Linear(4, 4, rngs=rngs)
    self.spare = nnx.Embed(3, 4, rngs=rngs)

  def __call__(self, x):
    return self.first(x) * self.read.kernel[:1]


def test_a_layer_that_is_not_called_stays_float_where_skip_names_it():
  model, x = Unused(), jnp.ones((2, 4))
  with pytest.raises(ValueError, match=r"reach \['spare'\].*name them in skip"):
    nn.quantize(
      model, weight=quant.double_rounding((8, 4)), sample=x, skip="read"
    )
  network = nn.quantize(
    model,
    weight=quant.double_rounding((8, 4)),
    sample=x,
    skip=("read", "spare"),
  )
  rows = nn.coverage(model, network, x)
  assert [(row.name, row.macs, row.reason) for row in rows] == [
    ("first", 16, ""),
    ("read", 0, "not called"),
    ("spare", 0, "not called"),
  ]
  assert type(network.read) is nnx.Linear
