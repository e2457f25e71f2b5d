"""Tests of update directions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dr_jax.train import make_optimizer

KINDS = {"w": "weight", "b": "vector", "n": "norm", "s": "scale"}


def _tree(seed, shape=(3, 2)):
  keys = jax.random.split(jax.random.key(seed), 4)
  return {
    name: jax.random.normal(key, shape)
    for name, key in zip(KINDS, keys, strict=True)
  }


@pytest.mark.parametrize(
  ("name", "make_reference"),
  [
    ("adam", lambda: optax.scale_by_adam()),
    ("adamw", lambda: optax.scale_by_adam()),
    ("sgd", lambda: optax.trace(0.9)),
  ],
)
def test_without_decay_every_label_gets_the_plain_optimizer(
  name, make_reference
):
  params, reference = _tree(0), make_reference()
  ours = make_optimizer(name, param_labels=KINDS)
  state, expected_state = ours.init(params), reference.init(params)
  for seed in range(1, 6):
    gradients = _tree(seed)
    got, state = jax.jit(ours.update)(gradients, state, params)
    expected, expected_state = reference.update(gradients, expected_state)
    for leaf in KINDS:
      np.testing.assert_allclose(got[leaf], expected[leaf], rtol=1e-5)


def test_weight_decay_acts_on_weights_alone():
  params, zeros = _tree(0), jax.tree.map(jnp.zeros_like, _tree(0))
  ours = make_optimizer(
    "sgd", param_labels=KINDS, weight_decay=0.5, momentum=0.0
  )
  got, _ = ours.update(zeros, ours.init(params), params)
  np.testing.assert_allclose(got["w"], 0.5 * params["w"], rtol=1e-6)
  for leaf in ("b", "n", "s"):
    np.testing.assert_array_equal(got[leaf], 0)


def test_decay_of_adamw_is_not_scaled_by_its_moments():
  params, gradients = _tree(0), _tree(1)
  ours = make_optimizer("adamw", param_labels=KINDS, weight_decay=0.5)
  got, _ = ours.update(gradients, ours.init(params), params)
  reference = optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.5, mask={"w": True, **dict.fromkeys("bns", 0)}),
  )
  expected, _ = reference.update(gradients, reference.init(params), params)
  for leaf in KINDS:
    np.testing.assert_allclose(got[leaf], expected[leaf], rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_an_unused_row_rests_as_a_separate_parameter_would(name):
  """Row 0 is used in every other step; it must see only its own gradients."""
  kinds = {"s": "scale"}
  ours = make_optimizer(name, param_labels=kinds)
  params = {"s": jnp.ones((2, 3))}
  state = ours.init(params)
  alone = optax.scale_by_adam() if name == "adam" else optax.trace(0.9)
  alone_state = alone.init(jnp.ones(3))
  for step in range(6):
    used = step % 2 == 0
    row = jax.random.normal(jax.random.key(step), (3,))
    gradients = {"s": jnp.stack([row if used else jnp.zeros(3), jnp.ones(3)])}
    got, state = ours.update(gradients, state, params)
    if used:
      expected, alone_state = alone.update(row, alone_state)
      np.testing.assert_allclose(got["s"][0], expected, rtol=1e-5)
    else:
      np.testing.assert_array_equal(got["s"][0], 0)


def test_an_unknown_optimizer_is_an_error_that_lists_the_known():
  with pytest.raises(
    ValueError,
    match=r"optimizer must be one of \('adam', 'adamw', 'sgd'\), .* 'lion'",
  ):
    make_optimizer("lion", param_labels=KINDS)
