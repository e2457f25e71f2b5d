"""Distillation losses against formulas in numpy and reference arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.train import distill

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 4)).astype(np.float32) * 3
TEACHER = RNG.normal(size=(5, 4)).astype(np.float32) * 3
LABELS = np.array([0, 3, 1, 2, 3], np.int32)
ONE_HOT = np.eye(4)[LABELS]


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def entropy(targets, logits):
  return -(targets * log_softmax(logits)).sum(-1).mean()


def softmax(logits):
  return np.exp(log_softmax(logits))


HARD = entropy(ONE_HOT, LOGITS)
MEANS = softmax(RNG.normal(size=(4, 4)))
AT_FOUR = softmax(TEACHER / 4)
DIVERGENCE = (
  (AT_FOUR * (log_softmax(TEACHER / 4) - log_softmax(LOGITS / 4)))
  .sum(-1)
  .mean()
)
SOFT = entropy(softmax(TEACHER), LOGITS)
EXPECTED = {  # at the first visit, and at a later one after half of the run
  "none": (HARD, HARD),
  "recursive": (HARD, SOFT),
  "highest": (HARD, SOFT),
  "progressive": (HARD, 0.65 * HARD + 0.35 * SOFT),
  "resolution": (0.45 * HARD, 0.45 * HARD + 1.6 * DIVERGENCE),
  "online_label_highest": (HARD, 0.5 * HARD + 0.5 * SOFT),
  "online_label_class_means": (entropy((ONE_HOT + MEANS[LABELS]) / 2, LOGITS),)
  * 2,
}


def loss(name, visit, logits=LOGITS):
  memory = {"means": jnp.asarray(MEANS, jnp.float32)}
  return distill.get(name).loss(
    logits, LABELS, TEACHER, visit, jnp.float32(0.5), memory
  )


@pytest.mark.parametrize("name", distill.SCHEMES)
def test_losses_match_the_formulas_for_constant_and_traced_passes(name):
  for visit, expected in zip((0, 2), EXPECTED[name], strict=True):
    # float32 against float64.
    np.testing.assert_allclose(loss(name, visit), expected, rtol=1e-5)
    traced = jax.jit(lambda visit: loss(name, visit))(jnp.int32(visit))
    np.testing.assert_allclose(traced, expected, rtol=1e-5)


@pytest.mark.parametrize("name", distill.SCHEMES)
def test_labels_of_a_sequence_count_as_labels_of_as_many_examples(name):
  scheme = distill.get(name)
  memory = {"means": jnp.asarray(MEANS, jnp.float32)}
  labels = np.array([[0, 3], [1, 2]], np.int32)
  logits, teacher = (x[:4].reshape(2, 2, 4) for x in (LOGITS, TEACHER))
  of_sequences = scheme.loss(logits, labels, teacher, 1, 0.5, memory)
  of_examples = scheme.loss(
    LOGITS[:4], labels.reshape(-1), TEACHER[:4], 1, 0.5, memory
  )
  np.testing.assert_allclose(of_sequences, of_examples, rtol=1e-6)
  learned = scheme.learn(memory, logits, labels)
  expected = scheme.learn(memory, LOGITS[:4], labels.reshape(-1))
  np.testing.assert_array_equal(learned["means"], expected["means"])


def test_every_scheme_has_an_expectation_here():
  assert set(EXPECTED) == set(distill.SCHEMES)


def test_class_means_move_by_a_tenth_and_only_where_a_sample_was_right():
  scheme = distill.get("online_label_class_means")
  memory = scheme.init(3)
  np.testing.assert_array_equal(memory["means"], np.eye(3))
  logits = np.array([[3, 1, 0], [2, 0, 0], [0, 1, 2], [5, 0, 0]], np.float32)
  labels = np.array([0, 0, 1, 2])  # the last two are wrong
  learned = scheme.learn(memory, logits, labels)["means"]
  seen = softmax(logits[:2]).mean(0)
  expected = np.eye(3)
  expected[0] = 0.9 * expected[0] + 0.1 * seen
  np.testing.assert_allclose(learned, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["recursive", "soft"])
def test_any_precision_losses_and_gradients_match_the_reference(golden, kind):
  arrays = golden("any_precision.npz")
  order = arrays["kd.order"]
  labels = jnp.asarray(arrays["kd.labels"], jnp.int32)
  scheme = distill.get({"recursive": "recursive", "soft": "highest"}[kind])
  every = [arrays[f"kd.recursive.b{b}.logits"] for b in order]
  for visit, b in enumerate(order):
    if f"kd.{kind}.b{b}.loss" not in arrays:
      continue
    teacher = every[max(visit - 1, 0)] if kind == "recursive" else every[0]
    value, gradient = jax.value_and_grad(scheme.loss)(
      *(every[visit], labels, teacher, visit, jnp.float32(1), {})
    )
    np.testing.assert_allclose(value, arrays[f"kd.{kind}.b{b}.loss"], rtol=1e-5)
    np.testing.assert_allclose(
      gradient, arrays[f"kd.{kind}.b{b}.glogits"], rtol=1e-5, atol=1e-6
    )


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
  with pytest.raises(
    ValueError, match="distillation must be one of.*got 'teacher'"
  ):
    distill.get("teacher")


@pytest.mark.parametrize("name", distill.SCHEMES)
def test_a_label_that_is_no_class_makes_the_first_loss_nan(name):
  labels = LABELS.copy()
  labels[0] = -1
  memory = {"means": jnp.asarray(MEANS, jnp.float32)}
  first = distill.get(name).loss(
    LOGITS, labels, TEACHER, 0, jnp.float32(0.5), memory
  )
  assert np.isnan(first)
