"""Tests of the memory that compiled steps take."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from dr_jax import nn, quant
from dr_jax.train import make_optimizer, make_trainer

BITS = (8, 4)
SHAPE = (64, 12, 12, 8)


class Chain(nnx.Module):
  """Convolutions of equal shapes, each with a norm and a ReLU before it."""

  def __init__(self, rngs):
    convolution = functools.partial(
      nnx.Conv, 8, 8, (3, 3), use_bias=False, rngs=rngs
    )
    self.convolutions = nnx.List([convolution() for _ in range(4)])
    self.norms = nnx.List([nnx.BatchNorm(8, rngs=rngs) for _ in range(4)])
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    for norm, convolution in zip(self.norms, self.convolutions, strict=True):
      x = convolution(nnx.relu(norm(x)))
    return self.head(x.mean((1, 2)))


@functools.cache
def temporary_bytes(bits=(), schedule="alternate", vectorize="unroll"):
  """Of the main program of a step; of the float network's without bits."""
  network = Chain(nnx.Rngs(0))
  if bits:
    network = nn.quantize(
      network,
      weight=quant.double_rounding(bits),
      activation=quant.lsq_activation(bits),
      sample=jnp.ones(SHAPE),
      skip=["head"],
    )
  split = nn.functional(network)
  trainer = make_trainer(
    split,
    make_optimizer("sgd", param_labels=split.param_labels),
    optax.constant_schedule(0.1),
    schedule=schedule,
    vectorize=vectorize,
  )
  batch = {"image": jnp.ones(SHAPE), "label": jnp.zeros(SHAPE[0], jnp.int32)}
  compiled = trainer.lower(trainer.init(jax.random.key(0)), batch).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
  ("bits", "vectorize"), [(BITS[:1], "unroll"), (BITS, "sequential")]
)
def test_quantized_step_takes_less_memory_than_float_step(bits, vectorize):
  # 1.0 times as much where quantized inputs are kept from the forward pass.
  quantized = temporary_bytes(bits, vectorize=vectorize)
  assert quantized < 0.85 * temporary_bytes()


def test_summed_passes_take_little_more_memory_than_one():
  # Twice as much where forward passes do not wait.
  summed = temporary_bytes(BITS, "accumulate")
  assert summed < 1.2 * temporary_bytes(BITS[:1])
