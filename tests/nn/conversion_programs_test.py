"""How many programs a conversion compiles."""

import itertools

import jax
import pytest
from flax import nnx

from dr_jax import nn, quant


class Stack(nnx.Module):
  """Blocks of one shape, or of given widths."""

  def __init__(self, depth=0, widths=()):
    rngs = nnx.Rngs(0)
    widths = widths or [4] * (depth + 1)
    self.blocks = nnx.List(
      nnx.Sequential(
        nnx.Conv(c_in, c_out, (3, 3), rngs=rngs),
        nnx.BatchNorm(c_out, rngs=rngs),
        nnx.relu,
      )
      for c_in, c_out in itertools.pairwise(widths)
    )

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return x


def programs(model, init, compiled):
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


@pytest.fixture
def compiled():
  """Seconds of each compilation so far."""
  seconds = []

  def count(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      seconds.append(duration)

  jax.monitoring.register_event_duration_secs_listener(count)
  yield seconds
  jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize("init", ["published", "mse"])
def test_layers_of_one_shape_share_their_programs(init, compiled):
  programs(
    Stack(1), init, compiled
  )  # and what later conversions have in common
  # The network with its statistics, initial parameters of the weights, and
  # inputs of least error with and without a sign.
  expected = 2 if init == "published" else 4
  assert programs(Stack(3), init, compiled) <= expected
  assert programs(Stack(6), init, compiled) <= expected


def test_a_further_shape_costs_a_program_for_its_kernel_and_one_for_its_norm(
  compiled,
):
  programs(Stack(1), "published", compiled)
  widths = (4, 7, 11, 13, 5, 9)
  found = programs(Stack(widths=widths), "published", compiled)
  assert found <= 1 + 2 * (len(widths) - 1)
