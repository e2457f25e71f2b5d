"""Scores of batches with labels, masks, or nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, train


@pytest.fixture(scope="module")
def scored():
  network = nn.functional(nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
  evaluate = train.make_evaluate(network)
  return lambda batches: evaluate(
    network.params, network.batch_stats, 0, batches
  )


def batch(labels, mask):
  return {
    "image": np.eye(8, dtype=np.float32)[: len(labels)],
    "label": np.array(labels, np.int32),
    "mask": np.array(mask, np.float32),
  }


@pytest.mark.parametrize("label", [-1, 3, 100])
def test_a_label_that_is_no_class_is_wrong_and_makes_the_loss_nan(
  scored, label
):
  score = scored([batch([label, 0], [1, 1])])
  assert np.isnan(score.loss) and score.accuracy <= 50


def test_an_example_with_mask_0_does_not_count_whatever_its_label(scored):
  score = scored([batch([0, -1], [1, 0]), batch([5], [0])])
  assert score == scored([batch([0], [1])])


@pytest.mark.parametrize("batches", [[], [batch([0], [0])]])
def test_no_example_is_an_error(scored, batches):
  with pytest.raises(
    ValueError, match="batches must hold an example, got none"
  ):
    scored(batches)


def test_cross_entropy_of_a_label_that_is_no_class_is_nan():
  logits = jnp.array([[0.0, 1.0, 2.0]])
  for label in (-1, 3):
    assert np.isnan(train.cross_entropy(logits, jnp.array([label])))
  grads = jax.grad(train.cross_entropy)(logits, jnp.array([1]))
  p = jax.nn.softmax(logits)
  np.testing.assert_allclose(grads, p.at[0, 1].add(-1), rtol=1e-6)


def test_an_example_of_several_labels_counts_with_their_mean(scored):
  def sequences(labels, mask):
    images = np.eye(8, dtype=np.float32)[: np.size(labels)]
    return {
      "image": images.reshape(*np.shape(labels), 8),
      "label": np.array(labels, np.int32),
      "mask": np.array(mask, np.float32),
    }

  labels = [[0, 1], [2, 0], [1, 1]]
  score = scored([sequences(labels, [1, 1, 0])])
  np.testing.assert_allclose(score, scored([batch([0, 1, 2, 0], [1] * 4)]))
