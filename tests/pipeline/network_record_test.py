"""Tests of what a report says of a trained network, on a small one."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, quant, train
from dr_jax.pipeline import network_record
from dr_jax.report.network_record import schema_of
from dr_jax.runtime import schema

BITS = (8, 4, 2)
IMAGES = np.asarray(jax.random.normal(jax.random.key(1), (8, 6)))
LABELS = np.arange(8) % 3


def network(weight):
  layers = (
    nnx.Linear(6, 5, rngs=nnx.Rngs(0)),
    jnp.tanh,  # Sums of few products are often 0, where ReLU has a corner.
    nnx.Linear(5, 3, rngs=nnx.Rngs(1)),
  )
  return nn.quantize(
    nnx.Sequential(*layers),
    weight=weight,
    activation=quant.lsq_activation(BITS),
    sample=IMAGES,
    skip=(),
  )


def measured(model):
  batch = {"image": IMAGES, "label": LABELS}
  run = types.SimpleNamespace(bits=BITS, batches=lambda: [batch])
  record = network_record.measure(run, "multi_precision", model)
  schema.check(record, schema_of(BITS))
  return record


def test_gradients_are_those_of_each_bit_width():
  model = network(quant.double_rounding(BITS))
  gradients = measured(model)["gradients"]
  split = nn.functional(model)

  def loss(params, index):
    logits, _ = split.apply(params, split.batch_stats, index, IMAGES)
    return train.cross_entropy(logits, jnp.asarray(LABELS))

  gradient = jax.jit(jax.grad(loss))
  expected = {
    str(b): gradient(split.params, jnp.int32(i)) for i, b in enumerate(BITS)
  }
  assert gradients["examples"] == 8
  found = {(s["layer"], s["of"]): s["gradient"] for s in gradients["scales"]}
  assert list(found) == [
    (f"layers/{n}", of) for n in (0, 2) for of in ("input", "weight")
  ]
  for (layer, of), sizes in found.items():
    _, number = layer.split("/")
    for b, size in sizes.items():
      scale = expected[b]["layers"][number][f"{of}_params"]["scale"]
      assert size == pytest.approx(float(jnp.abs(scale).max()), rel=1e-4)


def test_grids_are_in_units_of_the_scale():
  model = network(quant.double_rounding(BITS))
  first = measured(model)["weights"]["layers/0"]
  assert list(first) == ["8", "4", "2"]
  for histogram in first.values():
    assert sum(histogram["counts"]) == 6 * 5
    assert histogram["low"] < 0 < histogram["high"]
  # Codes of 2 bits are multiples of 2^(8 - 2) scales.
  assert set(first["2"]["levels"]) <= {-128.0, -64.0, 0.0, 64.0}
  assert set(first["4"]["levels"]) <= {16.0 * n for n in range(-8, 8)}
  assert len(first["2"]["levels"]) >= 3


def test_a_scale_per_bit_width_has_a_unit_per_bit_width():
  first = measured(network(quant.lsq(BITS)))["weights"]["layers/0"]
  assert set(first["2"]["levels"]) <= {-2.0, -1.0, 0.0, 1.0}
  assert set(first["4"]["levels"]) <= set(map(float, range(-8, 8)))


def test_methods_without_scales_have_their_own_weights():
  record = measured(network(quant.adabits(BITS)))
  first = record["weights"]["layers/0"]
  assert 2 <= len(first["2"]["levels"]) <= 4
  assert sum(first["2"]["counts"]) == 6 * 5
  # Only those of inputs are learned.
  assert {s["of"] for s in record["gradients"]["scales"]} == {"input"}


def test_channels_with_different_grids_have_no_levels():
  first = measured(network(quant.bitwave(BITS)))["weights"]["layers/0"]
  assert first["2"]["levels"] == [] and sum(first["2"]["counts"]) == 6 * 5
