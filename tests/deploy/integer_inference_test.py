"""Integer inference end to end: trained networks, every test image."""

import jax
import numpy as np
import pytest
from flax import nnx
from stored_networks import BITS, stored_network

from dr_jax import nn

INTEGER = ("integer", "im2col", "carrier")


def logits_of(network, images):
  """Logits at every bit-width, [bits, images, classes]."""
  split = nn.functional(network)

  @jax.jit
  def logits(index, images):
    return split.apply(split.params, split.batch_stats, index, images)[0]

  batches = np.split(images, -(-len(images) // 1000))
  return np.array(
    [
      np.concatenate([logits(np.int32(index), batch) for batch in batches])
      for index in range(len(BITS))
    ]
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_predictions_in_integers_are_those_of_the_float_layers(name):
  stored, images = stored_network(name)
  expected = logits_of(stored, images)
  classes = expected.argmax(-1)
  # The network has learned something: it tells classes apart.
  assert min(len(np.unique(row)) for row in classes) >= 6
  first, second = np.sort(expected, -1)[..., :-3:-1].transpose(2, 0, 1)
  network = nnx.clone(stored)
  for backend in INTEGER:
    nn.set_backend(network, backend)
    differ = logits_of(network, images).argmax(-1) != classes
    # Floats are added in another order, which can decide a tie of codes, and
    # that one between classes.
    print(f"{name}, {backend}: {differ.sum(1)} of {len(images)} differ")
    assert (differ.sum(1) <= len(images) / 5000).all()
    assert ((first - second)[differ] < 0.01 * expected.std()).all()
