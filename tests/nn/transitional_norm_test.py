"""Transitional batch norm: one row per pair of neighboring bit-widths."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import nn, quant

BITS = (8, 4, 2)
LAYERS = ("first", "second", "third")
NORMS = ("norm1", "norm2", "norm3")
ASSIGNMENTS = tuple(itertools.product(range(3), repeat=3))


class Chain(nnx.Module):
  """Three linear layers, a norm after each."""

  def __init__(self, rngs):
    for layer, norm in zip(LAYERS, NORMS, strict=True):
      setattr(self, layer, nnx.Linear(4, 4, rngs=rngs))
      setattr(self, norm, nnx.BatchNorm(4, momentum=0.9, rngs=rngs))

  def __call__(self, x):
    x = nnx.relu(self.norm1(self.first(x)))
    x = nnx.relu(self.norm2(self.second(x)))
    return self.norm3(self.third(x))


class Pre(nnx.Module):
  """Norms before their layers; the first sees the input."""

  def __init__(self, rngs):
    for layer, norm in zip(LAYERS, NORMS, strict=True):
      setattr(self, layer, nnx.Linear(4, 4, rngs=rngs))
      setattr(self, norm, nnx.BatchNorm(4, rngs=rngs))

  def __call__(self, x):
    for layer, norm in zip(LAYERS, NORMS, strict=True):
      x = getattr(self, layer)(nnx.relu(getattr(self, norm)(x)))
    return x


class Crossed(nnx.Module):
  """All layers come before all norms; norms in another order."""

  def __init__(self, rngs):
    for layer, norm in zip(LAYERS, NORMS, strict=True):
      setattr(self, layer, nnx.Linear(4, 4, rngs=rngs))
      setattr(self, norm, nnx.BatchNorm(4, rngs=rngs))

  def __call__(self, x):
    y1, y2, y3 = self.first(x), self.second(x), self.third(x)
    return self.norm3(y3) + self.norm2(y2) + self.norm1(y1)


class Joined(Chain):
  """The third norm sees a sum: a residual join."""

  def __call__(self, x):
    x = self.norm1(self.first(x))
    x = x + self.norm2(self.second(x))
    return self.third(self.norm3(x))


def inputs(n=16, seed=0):
  x = np.random.default_rng(seed).normal(size=(n, 4))
  return jnp.asarray(x, jnp.float32)


def quantize(model, *, bits=BITS, norm="transitional", **options):
  return nn.quantize(
    model,
    weight=quant.double_rounding(bits),
    sample=inputs(),
    norm=norm,
    **{"skip": (), **options},
  )


def scatter(model):
  """Gives every row of every norm different numbers."""
  rng = np.random.default_rng(7)
  for norm in NORMS:
    for name in ("scale", "bias", "mean", "var"):
      variable = getattr(getattr(model, norm), name)
      value = rng.uniform(0.5, 1.5, variable.shape)
      variable[...] = jnp.asarray(value, jnp.float32)
  return model


@functools.cache
def built():
  return scatter(quantize(Chain(nnx.Rngs(0))))


@pytest.fixture
def model():
  return nnx.clone(built())


def rows(index):
  """The row of each norm by the formula: previous * 3 + own."""
  i, j, k = index
  return {"norm1": i, "norm2": 3 * i + j, "norm3": 3 * j + k}


def by_hand(model, index, x):
  """The inference of Chain in numpy, from rows picked by `rows`."""
  used = rows(index)
  x = np.asarray(x, np.float64)
  for layer, norm, i in zip(LAYERS, NORMS, index, strict=True):
    x = np.maximum(x, 0) if layer != "first" else x
    layer, row = getattr(model, layer), used[norm]
    w = layer.weight_quantizer.fake_quantize(
      {"scale": layer.weight_params["scale"][...]}, layer.kernel[...], i
    )
    x = x @ np.asarray(w, np.float64) + np.asarray(layer.bias[...])
    norm = getattr(model, norm)
    scale, bias, mean, var = (
      np.asarray(v[...])[row]
      for v in (norm.scale, norm.bias, norm.mean, norm.var)
    )
    x = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
  return x


def close(a, b):
  # float32 against float64, or the same sums in another order.
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_row_for_each_pair_and_after_the_first_layer_for_each_bit_width():
  float_model = Chain(nnx.Rngs(0))
  float_model.norm2.mean[...] = jnp.arange(4.0) - 2
  model = quantize(float_model)
  shapes = [getattr(model, norm).scale.shape for norm in NORMS]
  assert shapes == [(3, 4), (9, 4), (9, 4)]
  expected = np.stack([np.arange(4.0) - 2] * 9)
  np.testing.assert_array_equal(model.norm2.mean[...], expected)


@pytest.mark.parametrize(
  ("make", "orders"),
  [
    (Chain, [(0,), (0, 1), (1, 2)]),
    (Pre, [(0,), (0,), (0, 1)]),
    (Crossed, [(0,), (0, 1), (1, 2)]),
    (Joined, [(0,), (0, 1), (0, 1)]),
  ],
)
def test_the_layer_before_is_the_one_called_just_before(make, orders):
  model = quantize(make(nnx.Rngs(0)))
  assert [getattr(model, norm).orders for norm in NORMS] == orders


def test_a_layer_that_stays_float_is_not_the_one_before():
  model = quantize(Chain(nnx.Rngs(0)), skip="first")
  assert [getattr(model, norm).orders for norm in NORMS] == [(0,), (0,), (0, 1)]
  model = quantize(Chain(nnx.Rngs(0)), skip="second")
  assert [getattr(model, norm).orders for norm in NORMS] == [(0,), (0,), (0, 1)]


def test_set_bits_picks_the_row_of_previous_and_own(model):
  model.eval()
  for index in ((0, 0, 0), (0, 2, 1), (2, 0, 1), (1, 2, 2), (2, 1, 0)):
    bits = dict(zip(LAYERS, (BITS[i] for i in index), strict=True))
    nn.set_bits(model, bits)
    used = {norm: int(getattr(model, norm).row) for norm in NORMS}
    assert used == rows(index)
    close(model(inputs()), by_hand(model, index, inputs()))
  nn.set_bits(model, 4)
  close(model(inputs()), by_hand(model, (1, 1, 1), inputs()))


def test_one_compilation_serves_all_assignments(model):
  split = nn.functional(model)
  traces = []

  @jax.jit
  def run(index):
    traces.append(index)
    return split.apply(split.params, split.batch_stats, index, inputs())[0]

  for index in ASSIGNMENTS:
    close(run(jnp.asarray(index)), by_hand(model, index, inputs()))
  assert len(traces) == 1
  for i in range(3):
    y = split.apply(split.params, split.batch_stats, i, inputs())[0]
    close(y, by_hand(model, (i, i, i), inputs()))
  y = split.apply(split.params, split.batch_stats, (2, 0, 1), inputs())[0]
  close(y, by_hand(model, (2, 0, 1), inputs()))


def test_vmap_over_assignments_equals_the_hand_computation(model):
  split = nn.functional(model)
  together = jax.jit(
    jax.vmap(
      lambda index: split.apply(
        split.params, split.batch_stats, index, inputs()
      )[0]
    )
  )(jnp.asarray(ASSIGNMENTS))
  for y, index in zip(together, ASSIGNMENTS, strict=True):
    close(y, by_hand(model, index, inputs()))


def changed(before, after):
  before, after = np.asarray(before), np.asarray(after)
  return [
    r for r in range(len(after)) if not np.array_equal(before[r], after[r])
  ]


def test_training_reaches_only_the_rows_in_use(model):
  split = nn.functional(model)
  kinds = {k for norm in NORMS for k in split.param_labels[norm].values()}
  assert kinds == {"norm"}

  @jax.jit
  def step(index):
    def loss(params):
      y, stats = split.apply(
        params, split.batch_stats, index, inputs(), train=True
      )
      return (y * inputs(seed=1)).sum(), stats

    return jax.grad(loss, has_aux=True)(split.params)

  for index in ASSIGNMENTS:
    gradients, stats = step(jnp.asarray(index))
    for norm, row in rows(index).items():
      for name in ("scale", "bias"):
        gradient = gradients[norm][name]
        assert changed(jnp.zeros_like(gradient), gradient) == [row]
      for name in ("mean", "var"):
        old = split.batch_stats[norm][name]
        assert changed(old, stats[norm][name]) == [row]


def test_recalibration_writes_only_the_rows_in_use(model):
  nn.set_bits(model, {"first": 2, "second": 8, "third": 4})
  before = nnx.clone(model)
  nn.recalibrate(model, [inputs(seed=3), inputs(seed=4)])
  for norm, row in rows((2, 0, 1)).items():
    old, new = getattr(before, norm), getattr(model, norm)
    assert changed(old.mean[...], new.mean[...]) == [row]
    assert changed(old.var[...], new.var[...]) == [row]


def test_an_assembled_network_equals_the_trained_one_at_every_assignment(model):
  parts = nn.deployed.parts_of(model)
  assert [norm.orders for norm in parts.norms.values()] == [
    *((0,), (0, 1), (1, 2))
  ]
  trained = nn.functional(model)
  stored = nn.functional(nn.deployed.assemble(Chain(nnx.Rngs(1)), parts))

  @jax.jit
  def run(index):
    return [
      split.apply(split.params, split.batch_stats, index, inputs())[0]
      for split in (trained, stored)
    ]

  for index in ASSIGNMENTS:
    expected, got = run(jnp.asarray(index))
    close(got, expected)
  assembled = nn.deployed.assemble(Chain(nnx.Rngs(1)), parts)
  nn.set_bits(assembled, {"first": 2, "second": 8, "third": 4})
  assert [int(getattr(assembled, norm).row) for norm in NORMS] == [2, 6, 1]


def test_one_bit_width_needs_one_row():
  model = quantize(Chain(nnx.Rngs(0)), bits=(4,))
  assert model.norm2.scale.shape == (1, 4)
  model.eval()
  switchable = quantize(Chain(nnx.Rngs(0)), bits=(4,), norm="switchable")
  switchable.eval()
  np.testing.assert_array_equal(model(inputs()), switchable(inputs()))


def test_the_table_of_layers_is_that_of_other_norms(model):
  nn.set_bits(model, {"first": 2, "second": 8, "third": 4})
  other = quantize(Chain(nnx.Rngs(0)), norm="shared")
  nn.set_bits(other, {"first": 2, "second": 8, "third": 4})
  assert nn.layer_table(model) == nn.layer_table(other)
