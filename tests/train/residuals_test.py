"""Tests of what a pass is said to keep, against compiled programs."""

import jax
import optax
import pytest
import training_network as net
from flax import nnx

from dr_jax import nn
from dr_jax.train import (
  make_optimizer,
  make_trainer,
  passes_at_once,
  residual_bytes,
)

# Of activations, which grow with the batch, and not of gradients.
BATCH = 256


def kept(network, size=BATCH):
  image = net.batch(size=size)["image"]
  return residual_bytes(network, jax.ShapeDtypeStruct(image.shape, image.dtype))


@pytest.mark.parametrize("quantized", [False, True])
def test_activations_grow_with_the_batch(quantized):
  network = nn.functional(
    net.quantized() if quantized else net.Net(nnx.Rngs(0))
  )
  small, large = kept(network, 64), kept(network, 128)
  # What does not grow is what kernels are rounded to, 9 * (4 + 6) * 6 floats.
  assert 0 <= 2 * small - large < 1.5 * 4 * 540


def test_quantized_inputs_are_not_kept():
  assert kept(nn.functional(net.quantized())) < kept(
    nn.functional(net.Net(nnx.Rngs(0)))
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("schedule", "vectorize"),
  [
    *(("alternate", "sequential"), ("alternate", "unroll")),
    *(("accumulate", "unroll"), ("accumulate", "vmap")),
  ],
)
def test_compiled_steps_take_half_of_it_to_all(schedule, vectorize):
  network = nn.functional(net.quantized())
  trainer = make_trainer(
    network,
    make_optimizer("sgd", param_labels=network.param_labels),
    optax.constant_schedule(0.1),
    schedule=schedule,
    vectorize=vectorize,
  )
  state = trainer.init(jax.random.key(0))
  compiled = trainer.lower(state, net.batch(size=BATCH)).compile()
  passes = passes_at_once(vectorize, len(net.BITS))
  ratio = compiled.memory_analysis().temp_size_in_bytes / kept(network)
  assert 0.4 < ratio / passes < 1.1
