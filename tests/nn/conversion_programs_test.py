"""How many programs a conversion compiles."""

import jax
import pytest
from flax import nnx

from dr_jax import nn, quant


class Stack(nnx.Module):
  """Blocks of one shape."""

  def __init__(self, depth):
    rngs = nnx.Rngs(0)
    self.blocks = nnx.List(
      nnx.Sequential(
        nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.relu
      )
      for _ in range(depth)
    )

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return x


def programs(depth, init, compiled):
  model = Stack(depth)
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
  before = len(compiled)
  nn.quantize(
    model,
    weight=quant.double_rounding((8, 4)),
    activation=quant.lsq_activation((8, 4)),
    sample=x,
    init=init,
    skip=(),
  )
  return len(compiled) - before


@pytest.mark.parametrize("init", ["published", "mse"])
def test_layers_of_one_shape_share_their_programs(init):
  compiled = []

  def count(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(duration)

  jax.monitoring.register_event_duration_secs_listener(count)
  try:
    programs(1, init, compiled)  # and what later conversions have in common
    # The network with its statistics, initial parameters of the weights, and
    # inputs of least error with and without a sign.
    expected = 2 if init == "published" else 4
    assert programs(3, init, compiled) <= expected
    assert programs(6, init, compiled) <= expected
  finally:
    jax.monitoring.unregister_event_duration_listener(count)
