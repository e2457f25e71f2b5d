"""Integer inference end to end: trained networks, every test image."""

import jax
import numpy as np
import pytest
from flax import nnx
from stored_networks import BITS, stored_network

from dr_jax import nn

INTEGER = ("integer", "im2col", "carrier")


def predictions(network, images):
  """Classes at every bit-width, [bits, images]."""
  split = nn.functional(network)

  @jax.jit
  def classes(index, images):
    logits, _ = split.apply(split.params, split.batch_stats, index, images)
    return logits.argmax(-1)

  batches = np.split(images, -(-len(images) // 1000))
  return np.array(
    [
      np.concatenate([classes(np.int32(index), batch) for batch in batches])
      for index in range(len(BITS))
    ]
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_predictions_in_integers_are_those_of_the_float_layers(name):
  stored, images = stored_network(name)
  expected = predictions(stored, images)
  # The network has learned something: it tells classes apart.
  assert min(len(np.unique(row)) for row in expected) >= 6
  network = nnx.clone(stored)
  for backend in INTEGER:
    nn.set_backend(network, backend)
    np.testing.assert_array_equal(predictions(network, images), expected)
