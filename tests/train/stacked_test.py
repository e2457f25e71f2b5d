"""Layers of a stack train as those of a list."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dr_jax import nn, quant
from dr_jax.train import alrs, make_optimizer, make_trainer
from tests.support.stacked_network import LAYERS, Listed, Scanned

BITS = (8, 4, 2)


def quantized(model, x):
  return nn.quantize(
    model,
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=x,
    skip=(),
  )


@functools.cache
def networks(axes):
  x = jax.random.normal(jax.random.key(0), (4, 5))
  model = Scanned(axes=axes)
  batch = {"image": x, "label": jnp.arange(4)}
  return batch, *(
    nn.functional(quantized(m, x)) for m in (model, Listed(model))
  )


# Which axes are scanned over and how rates are scaled do not meet.
@pytest.mark.parametrize(
  ("axes", "mode"),
  [
    ("all", "paper"),
    ("parameters", "paper"),
    *(
      pytest.param("all", mode, marks=pytest.mark.slow)
      for mode in alrs.MODES
      if mode != "paper"
    ),
  ],
)
def test_a_stack_is_updated_as_a_list(axes, mode):
  batch, *splits = networks(axes)
  trained = []
  for split in splits:
    trainer = make_trainer(
      split,
      make_optimizer(
        "sgd",
        param_labels=split.param_labels,
        momentum=0.0,
        weight_decay=0.1,
      ),
      # As large as gradients are: else "paper" has no room.
      optax.constant_schedule(0.9),
      schedule="accumulate",
      vectorize="unroll",
      alrs=mode,
    )
    state = trainer.init(jax.random.key(0))
    state, _ = trainer.step(state, batch)
    trained.append(state.params)
  stacked, expected = trained
  jax.tree.map(close, stacked["stem"], expected["stem"])
  for i in range(LAYERS):
    jax.tree.map(
      lambda a, b, i=i: close(a[i], b),
      stacked["blocks"],
      expected["blocks"][str(i)],
    )


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
