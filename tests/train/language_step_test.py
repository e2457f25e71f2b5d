"""A step of a language model: as one of images, one label for every byte.

Equal up to the order of float32 sums, as in `sharded_step_test`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dr_jax import models, nn, quant, train
from dr_jax.runtime import sharding

BITS = (8, 2)
STEPS = 2


def batch(seed):
  text = np.random.default_rng(seed).integers(0, 32, (8, 9), np.int32)
  return {"image": text[:, :-1], "label": text[:, 1:]}


@functools.cache
def network():
  model = models.build(
    "transformer",
    rngs=nnx.Rngs(0),
    **{"vocabulary": 32, "context": 8, "width": 16, "depth": 1, "heads": 2},
  )
  return nn.functional(
    nn.quantize(
      model,
      weight=quant.double_rounding(BITS),
      activation=quant.lsq_activation(BITS),
      sample=jnp.asarray(batch(0)["image"]),
    )
  )


@functools.cache
def stepped(vectorize, data=None, bits=1):
  """(parameters, losses) of a joint step with a distillation."""
  start, layout = network(), None
  if data is not None:
    layout = sharding.layout(data=data, bits=bits, parameters="sharded")
    layout = layout._replace(smallest=16)
  trainer = train.make_trainer(
    start,
    train.make_optimizer("sgd", param_labels=start.param_labels),
    optax.constant_schedule(0.5),
    schedule="accumulate",
    vectorize=vectorize,
    alrs="eta",
    distillation="recursive",
    layout=layout,
  )
  put = layout.shard_batch if layout is not None else lambda b: b
  state, losses = trainer.init(jax.random.key(0)), []
  for number in range(STEPS):
    state, loss = trainer.step(state, put(batch(number)))
    losses.append(np.asarray(loss))
  return state.params, np.array(losses)


def test_the_loss_is_the_mean_over_all_bytes():
  start = network()
  given = batch(0)
  logits, _ = start.apply(start.params, start.batch_stats, 0, given["image"])
  log_p = np.asarray(jax.nn.log_softmax(logits)).reshape(-1, 32)
  expected = -log_p[np.arange(64), given["label"].reshape(-1)].mean()
  _, losses = stepped("sequential")
  np.testing.assert_allclose(losses[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
  "devices",
  [{}, {"data": 4}, {"data": 2, "bits": 2}],
  ids=["one device", "sharded parameters", "sharded bit-widths"],
)
def test_passes_at_once_over_devices_are_those_one_by_one(devices):
  expected, losses = stepped("sequential")
  found, theirs = stepped("vmap", **devices)
  np.testing.assert_allclose(theirs, losses, rtol=1e-4)
  before = network().params
  kernel = found["blocks"]["0"]["gated"]["up"]["kernel"]
  assert kernel.sharding.is_fully_replicated == (not devices)

  def check(old, a, b):
    moved = np.abs(np.asarray(b) - np.asarray(old)).max()
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-3 * moved + 1e-6)
    return moved

  moved = jax.tree.map(check, before, found, expected)
  assert max(jax.tree.leaves(moved)) > 0.01
