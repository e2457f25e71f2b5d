"""Stochastic bit-switching: the draws by hand, and a SuperNet trained by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import training_network as net
from flax import nnx

from dr_jax import nn, quant
from dr_jax.train import (
  hasb,
  make_evaluate,
  make_optimizer,
  make_trainer,
)

BITS = (8, 6, 4, 2)
SHARE = np.array([0.4, 0.3, 0.2, 0.1])
EQUAL = np.full(4, 0.25)

# All but the one they are compared with.
OTHER_MODES = [
  ("alternate", "sequential"),
  pytest.param("accumulate", "sequential", marks=pytest.mark.slow),
  ("accumulate", "vmap"),
]


@pytest.mark.parametrize(
  ("bits", "share"),
  [(BITS, SHARE), ((4, 3, 2), np.array([4, 3, 2]) / 9), ((4,), [1.0])],
)
def test_sensitive_layers_draw_bits_in_proportion_and_others_uniformly(
  bits, share
):
  got = hasb.roulette([1.0, 6.0, 2.0], bits)
  equal = np.full(len(bits), 1 / len(bits))
  assert got.dtype == np.float32
  # Rounded to float32.
  np.testing.assert_allclose(got, [equal, share, equal], rtol=1e-7)


@pytest.mark.parametrize(
  ("sensitivity", "sensitive"),
  [
    ([1.0, 2.0, 3.0], [False, True, True]),
    ([-4.0, -2.0, -6.0], [True, True, False]),
    ([-1.0, 0.0, 4.0], [False, False, True]),
    # Their sum divided by their number is above each of them.
    ([0.1] * 3, [True] * 3),
    # Their sum overflows.
    ([1e308, 1.5e308, 1e308], [False, True, False]),
    ([5.0], [True]),
  ],
)
def test_a_layer_at_the_mean_or_above_is_sensitive(sensitivity, sensitive):
  got = hasb.roulette(sensitivity, BITS)
  expected = [SHARE if s else EQUAL for s in sensitive]
  np.testing.assert_allclose(got, expected, rtol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sensitivity_that_is_not_finite_is_named(value):
  with pytest.raises(
    ValueError, match="sensitivity of layer 1 must be finite, got"
  ):
    hasb.roulette([1.0, value, 2.0], BITS)


@pytest.mark.parametrize("sensitivity", [[], 1.0, [[1.0, 2.0]]])
def test_sensitivity_is_one_number_for_each_layer(sensitivity):
  with pytest.raises(
    ValueError, match="sensitivity must be one number for each quantized"
  ):
    hasb.roulette(sensitivity, BITS)


def sigmas(epochs, **options):
  run = jax.vmap(functools.partial(hasb.sigma, epochs=epochs, **options))
  return np.asarray(jax.jit(run)(jnp.arange(epochs)))


def test_sigma_rests_for_10_of_90_epochs_and_grows_to_a_half_in_the_last():
  got = sigmas(90)
  expected = np.where(np.arange(90) < 10, 0, 0.5 * np.arange(1, 91) / 90)
  assert got.dtype == np.float32
  # Two float32 roundings; zeros are exact.
  np.testing.assert_allclose(got, expected, rtol=2.5e-7)
  assert got[-1] == 0.5


@pytest.mark.parametrize(
  ("epochs", "warmup", "rest"),
  [(18, 1 / 9, 2), (9, 1 / 9, 1), (1, 1 / 9, 0), (4, 0, 0), (4, 0.5, 2)],
)
def test_the_warmup_is_a_fraction_of_the_run(epochs, warmup, rest):
  got = sigmas(epochs, start=0.75, warmup=warmup)
  expected = 0.75 * np.arange(1, epochs + 1) / epochs
  expected[:rest] = 0
  np.testing.assert_allclose(got, expected, rtol=2.5e-7)


def draws(sampling, *, layers, steps, number):
  """Draws of many runs at some steps, [steps, number, visits, layers]."""

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(None, 0))
  @functools.partial(jax.vmap, in_axes=(0, None))
  def draw(key, step):
    return jnp.stack(sampling.draw(key, len(BITS), layers, step))

  keys = jax.random.split(jax.random.key(7), number)
  return np.asarray(draw(keys, jnp.asarray(steps, jnp.int32)))


def expected_share(visit, sigma, roulette):
  """Of every bit-width, for a layer in the visit of bit-width `visit`."""
  return (1 - sigma) * np.eye(len(BITS))[visit] + sigma * roulette


def p_value(values, share):
  """Of the observed counts, where their expectation is number * share."""
  counts = np.bincount(values, minlength=share.size)
  return scipy.stats.chisquare(counts, len(values) * share.ravel()).pvalue


# Draws are fixed by their key, so that these do not fail by chance; with 20,000
# draws a share that is wrong by 0.02 has p < 1e-6.
def test_layers_keep_the_bits_of_the_pass_or_draw_their_own():
  sampling = hasb.sampling(
    [9.0, 1.0], BITS, steps=10, epochs=10, start=1.0, warmup=0.0
  )
  drawn = draws(sampling, layers=2, steps=[3, 9], number=20_000)
  assert drawn.shape == (2, 20_000, 4, 2)
  assert drawn.dtype == np.int32
  for rows, sigma in zip(drawn, (0.4, 1.0), strict=True):
    for visit in range(4):
      shares = [expected_share(visit, sigma, p) for p in (SHARE, EQUAL)]
      for layer, share in enumerate(shares):
        assert p_value(rows[:, visit, layer], share) > 1e-3
      pairs = 4 * rows[:, visit, 0] + rows[:, visit, 1]
      assert p_value(pairs, np.outer(*shares)) > 1e-3


def test_passes_of_a_step_draw_independently():
  sampling = hasb.sampling(
    [1.0], BITS, steps=1, epochs=1, start=0.5, warmup=0.0
  )
  drawn = draws(sampling, layers=1, steps=[0], number=20_000)[0, ..., 0]
  shares = [expected_share(visit, 0.5, SHARE) for visit in range(4)]
  for one in range(4):
    for other in range(one):
      pairs = 4 * drawn[:, one] + drawn[:, other]
      assert p_value(pairs, np.outer(shares[one], shares[other])) > 1e-3


def test_steps_belong_to_the_epochs_of_a_run_in_equal_parts():
  """Seven steps in three epochs: three, two and two."""
  sampling = hasb.sampling(
    [1.0], BITS, steps=7, epochs=3, start=1.0, warmup=1 / 3
  )
  drawn = draws(sampling, layers=1, steps=range(7), number=5_000)[..., 0]
  np.testing.assert_array_equal(drawn[:3], [[[0, 1, 2, 3]] * 5_000] * 3)
  for rows, sigma in zip(drawn[3:], (2 / 3, 2 / 3, 1, 1), strict=True):
    assert p_value(rows[:, 0], expected_share(0, sigma, SHARE)) > 1e-3


def test_draws_depend_on_the_key_and_are_the_same_under_jit():
  sampling = hasb.sampling([1.0] * 64, BITS, steps=1, epochs=1, start=1.0)

  def draw(seed):
    key, step = jax.random.key(seed), jnp.int32(0)
    return jnp.stack(sampling.draw(key, len(BITS), 64, step))

  first, again, other = draw(0), draw(0), draw(1)
  np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(first, jax.jit(draw)(0))
  assert (first != other).any()
  assert (first[0] != first[1]).any()


def test_passes_are_labeled_by_their_bit_widths():
  sampling = hasb.sampling([1.0], BITS, steps=1, epochs=1)
  assert sampling.labels(BITS) == BITS


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("start", -0.1),
    ("start", 1.1),
    ("start", np.nan),
    ("warmup", -0.1),
    ("warmup", 1.5),
    ("steps", 0),
    ("epochs", 0),
  ],
)
def test_an_option_out_of_range_is_named(option, value):
  options = {"steps": 4, "epochs": 2, option: value}
  with pytest.raises(ValueError, match=f"^{option} must be .*, got {value}"):
    hasb.sampling([1.0], BITS, **options)


class Chain(nnx.Module):
  """Three quantized convolutions, each with a norm behind it."""

  def __init__(self, rngs):
    conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
    norm = functools.partial(nnx.BatchNorm, momentum=0.9, rngs=rngs)
    self.stem = conv(1, 4, (3, 3))
    self.conv0, self.norm0 = conv(4, 4, (3, 3), strides=2), norm(4)
    self.conv1, self.norm1 = conv(4, 5, (3, 3)), norm(5)
    self.conv2, self.norm2 = conv(5, 4, (3, 3)), norm(4)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.stem(x))
    x = nnx.relu(self.norm0(self.conv0(x)))
    x = nnx.relu(self.norm1(self.conv1(x)))
    x = nnx.relu(self.norm2(self.conv2(x)))
    return self.head(x.mean((1, 2)))


LAYERS = 3
SENSITIVITY = (3.0, 1.0, 2.0)
STEPS = 20


@functools.cache
def supernet():
  uniform = nn.quantize(
    Chain(nnx.Rngs(0)),
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=net.batch()["image"],
  )
  return nn.functional(nn.requantize(uniform, norm="transitional"))


def switching():
  return hasb.sampling(SENSITIVITY, BITS, steps=STEPS, epochs=10, start=0.8)


@functools.cache
def make(schedule="alternate", vectorize="sequential", sampling=None):
  """The trainer of the run."""
  network = supernet()
  transform = make_optimizer("sgd", param_labels=network.param_labels)
  return make_trainer(
    network,
    transform,
    optax.constant_schedule(0.01),
    schedule=schedule,
    vectorize=vectorize,
    sampling=sampling or switching(),
  )


def prepare(step=0, **options):
  """The trainer of the run, and its first state, moved to another step."""
  trainer = make(**options)
  state = trainer.init(jax.random.key(3))
  return trainer, state._replace(step=jnp.int32(step))


def train(trainer, state, steps):
  losses = []
  for number in steps:
    state, loss = trainer.step(state, net.batch(number))
    losses.append(np.asarray(loss))
  return state, np.array(losses)


@functools.cache
def assignments():
  """What the steps of the run must draw, [STEPS, visits, layers]."""

  @jax.jit
  @jax.vmap
  def draw(step):
    key = jax.random.fold_in(jax.random.key(3), step)
    return jnp.stack(switching().draw(key, len(BITS), LAYERS, step))

  return np.asarray(draw(jnp.arange(STEPS)))


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  "vectorize", ["sequential", pytest.param("unroll", marks=pytest.mark.slow)]
)
def test_one_program_trains_all_assignments(vectorize):
  assert len(np.unique(assignments().reshape(-1, LAYERS), axis=0)) > 20
  step, state = prepare(vectorize=vectorize)
  state, losses = train(step, state, range(STEPS))
  assert step.program._cache_size() == 1
  assert losses.shape == (STEPS, len(BITS))
  assert np.isfinite(losses).all()
  assert int(state.step) == STEPS


def test_one_program_evaluates_all_assignments():
  network, traces = supernet(), []

  def apply(*args, **kwargs):
    traces.append(args)
    return network.apply(*args, **kwargs)

  evaluate = make_evaluate(network._replace(apply=apply))
  batches = [{**net.batch(), "mask": jnp.ones(8)}]
  losses = {
    evaluate(network.params, network.batch_stats, index, batches).loss
    for index in assignments()[10:].reshape(-1, LAYERS)
  }
  assert len(traces) == 1
  assert len(losses) > 10


@pytest.mark.parametrize("vectorize", ["sequential", "unroll"])
def test_a_step_moves_the_rows_of_the_bits_it_drew_and_no_others(vectorize):
  """Norms' rows are those of pairs; inputs share the bits of the weights."""
  number, count = 13, len(BITS)
  drawn = assignments()[number]
  assert len({tuple(row - row[0]) for row in drawn}) > 1
  step, state = prepare(vectorize=vectorize, step=number)
  # The step consumes its state.
  start = jax.tree.map(np.asarray, (state.params, state.batch_stats))
  state, _ = train(step, state, [number])

  def moved(before, after, *path):
    for key in path:
      before, after = before[key], after[key]
    changed = np.asarray(before != after)
    return set(np.flatnonzero(changed.reshape(len(changed), -1).any(1)))

  for layer in range(LAYERS):
    own = {int(row[layer]) for row in drawn}
    rows = own
    if layer:
      rows = {int(row[layer - 1] * count + row[layer]) for row in drawn}
    for name in ("mean", "var"):
      assert moved(start[1], state.batch_stats, f"norm{layer}", name) == rows
    for name in ("scale", "bias"):
      assert moved(start[0], state.params, f"norm{layer}", name) == rows
    path = (f"conv{layer}", "input_params", "scale")
    assert moved(start[0], state.params, *path) == own


@pytest.mark.parametrize(("schedule", "vectorize"), OTHER_MODES)
def test_assignments_are_the_same_in_every_mode(schedule, vectorize):
  results = []
  for mode in ("unroll", vectorize):
    step, state = prepare(schedule=schedule, vectorize=mode, step=15)
    results.append(train(step, state, [15, 16]))
  (expected, losses), (state, got) = results
  # Float reductions in another order; rounding to codes amplifies some.
  np.testing.assert_allclose(got, losses, rtol=1e-3)
  for x, y in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5)


def test_a_resumed_run_ends_in_the_same_bits():
  step, state = prepare()
  whole, losses = train(step, state, range(8))
  _, state = prepare()
  state, first = train(step, state, range(4))
  stored = jax.tree.map(
    np.asarray, state._replace(key=jax.random.key_data(state.key))
  )
  state = jax.tree.map(jnp.asarray, stored)
  state = state._replace(key=jax.random.wrap_key_data(state.key))
  state, second = train(step, state, range(4, 8))
  np.testing.assert_array_equal(np.concatenate([first, second]), losses)
  assert_equal(state._replace(key=()), whole._replace(key=()))
  assert_equal(*map(jax.random.key_data, (state.key, whole.key)))


@pytest.mark.parametrize(
  ("sensitivity", "bits", "message"),
  [
    ((1.0, 2.0), BITS, "sensitivity and bits must be of 3 layers and 4"),
    (SENSITIVITY, (4, 3, 2), "sensitivity and bits must be of 3 layers and 4"),
  ],
)
def test_sensitivities_of_another_network_are_an_error(
  sensitivity, bits, message
):
  sampling = hasb.sampling(sensitivity, bits, steps=STEPS, epochs=10)
  step, state = prepare(sampling=sampling)
  with pytest.raises(ValueError, match=message):
    train(step, state, [0])
