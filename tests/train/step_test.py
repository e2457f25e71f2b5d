"""Tests of training steps: schedules, vectorization, ALRS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_network as net
from flax import nnx

from dr_jax import models, nn, quant
from dr_jax.quant import SCALE_MAX, SCALE_MIN
from dr_jax.runtime.compilation import jit
from dr_jax.train import (
  alrs,
  cross_entropy,
  distill,
  gradients,
  loop,
  make_optimizer,
  make_trainer,
  sampling,
  schedules,
)

# All but the one they are compared with.
OTHER_MODES = [
  ("alternate", "sequential"),
  pytest.param("accumulate", "sequential", marks=pytest.mark.slow),
  ("accumulate", "vmap"),
]


@functools.cache
def _network(norm="switchable"):
  return nn.functional(net.quantized(norm=norm))


def _trainer(
  *,
  schedule="alternate",
  vectorize="sequential",
  mode="none",
  optimizer="sgd",
  rate=0.05,
  momentum=0.9,
  network=None,
  distillation="none",
  steps_in_run=None,
  **options,
):
  network = network or _network()
  transform = make_optimizer(
    optimizer,
    param_labels=network.param_labels,
    weight_decay=1e-3,
    momentum=momentum,
  )
  return make_trainer(
    network,
    transform,
    optax.constant_schedule(rate),
    schedule=schedule,
    vectorize=vectorize,
    alrs=mode,
    distillation=distillation,
    steps=steps_in_run,
    num_classes=3,
    **options,
  )


def _run(*, steps=2, **options):
  trainer = _trainer(**options)
  state, losses = trainer.init(jax.random.key(0)), []
  for number in range(steps):
    state, loss = trainer.step(state, net.batch(number))
    losses.append(np.asarray(loss))
  return state, np.array(losses)


def _assert_close(a, b, rtol=2e-3, atol=1e-5):
  # Float reductions in another order, then a few steps; rounding to codes may
  # amplify single entries.
  for (path, x), y in zip(
    jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=str(path))


def _direct_gradients(params, stats, index, batch):
  network = _network()

  def loss(params):
    logits, new = network.apply(
      params, stats, index, batch["image"], train=True
    )
    return cross_entropy(logits, batch["label"]), new

  return jit(jax.grad(loss, has_aux=True))(params)


def test_alternate_is_forward_backward_update_for_each_bit_width_in_turn():
  network, rate, batch = _network(), 1e-4, net.batch(0)
  params, stats = network.params, network.batch_stats
  for index in range(len(net.BITS)):
    gradients, stats = _direct_gradients(params, stats, index, batch)
    params = jax.tree.map(
      lambda p, g, kind: p - rate * (g + 1e-3 * p * float(kind == "weight")),
      params,
      gradients,
      network.param_labels,
    )
  state, _ = _run(steps=1, momentum=0.0, rate=rate)
  _assert_close(state.params, params, rtol=1e-4, atol=1e-6)
  _assert_close(state.batch_stats, stats, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  "vectorize",
  ["unroll", pytest.param("sequential", marks=pytest.mark.slow), "vmap"],
)
def test_accumulate_updates_once_with_the_sum_of_gradients(vectorize):
  network, rate, batch = _network(), 1e-4, net.batch(0)
  stats, total = network.batch_stats, None
  for index in range(len(net.BITS)):
    g, stats = _direct_gradients(network.params, stats, index, batch)
    total = g if total is None else jax.tree.map(jnp.add, total, g)
  expected = jax.tree.map(
    lambda p, g, kind: p - rate * (g + 1e-3 * p * float(kind == "weight")),
    network.params,
    total,
    network.param_labels,
  )
  state, _ = _run(
    steps=1,
    schedule="accumulate",
    vectorize=vectorize,
    momentum=0.0,
    rate=rate,
  )
  _assert_close(state.params, expected, rtol=1e-4, atol=2e-6)
  _assert_close(state.batch_stats, stats, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("schedule", "vectorize", "mode"),
  [
    ("alternate", "sequential", "relative"),
    pytest.param("alternate", "unroll", "none", marks=pytest.mark.slow),
    ("accumulate", "unroll", "none"),
    pytest.param("accumulate", "sequential", "none", marks=pytest.mark.slow),
    ("accumulate", "vmap", "none"),
  ],
)
def test_the_norm_of_scale_gradients_is_that_of_each_pass(
  schedule, vectorize, mode
):
  network, batch, expected = _network(), net.batch(0), []
  # Too slow for the first pass to change the gradient of the second.
  trainer = _trainer(
    schedule=schedule, vectorize=vectorize, mode=mode, momentum=0.0, rate=1e-4
  )
  for index in range(len(net.BITS)):
    g, _ = _direct_gradients(network.params, network.batch_stats, index, batch)
    scales = [g[name]["weight_params"]["scale"] for name in ("conv1", "conv2")]
    expected.append(np.sqrt(sum(np.sum(np.square(s)) for s in scales)))
  state = trainer.init(jax.random.key(0))
  _, losses, logged = trainer.logged_step(state, batch)
  # Under names that a resumed run knows to drop.
  assert list(logged) == ["scale_gradient_norm"]
  assert set(logged) < set(loop.NAMES)
  norms = logged["scale_gradient_norm"]
  assert norms.shape == losses.shape and norms.dtype == jnp.float32
  np.testing.assert_allclose(norms, expected, rtol=2e-3)


@pytest.mark.parametrize("name", [None, "adabits"])
def test_without_scales_of_weights_nothing_is_logged(name):
  network = nn.functional(net.Net(nnx.Rngs(0)))
  if name is not None:
    network = nn.functional(
      nn.quantize(
        net.Net(nnx.Rngs(0)),
        weight=quant.get(name, bits=net.BITS),
        activation=quant.lsq_activation(net.BITS),
        sample=net.batch()["image"],
      )
    )
    assert network.scale_layers
  trainer = _trainer(network=network, vectorize="unroll")
  state = jax.eval_shape(trainer.init, jax.random.key(0))
  _, losses, logged = jax.eval_shape(trainer.program, state, net.batch(0))
  assert losses.shape == (len(network.bits) or 1,) and logged == {}


@pytest.mark.parametrize(
  ("schedule", "vectorize"),
  [
    ("alternate", "unroll"),
    *(
      pytest.param(*mode, marks=pytest.mark.slow)
      for mode in [
        ("alternate", "sequential"),
        ("accumulate", "unroll"),
        ("accumulate", "sequential"),
        ("accumulate", "vmap"),
      ]
    ),
  ],
)
def test_logging_changes_no_bit_of_what_is_trained(
  monkeypatch, schedule, vectorize
):
  options = {"schedule": schedule, "vectorize": vectorize, "mode": "relative"}
  with_norms, _ = _run(**options)
  monkeypatch.setattr(gradients, "logged_of", lambda network, gradients: {})
  without, _ = _run(**options)
  jax.tree.map(
    np.testing.assert_array_equal,
    with_norms._replace(key=0),
    without._replace(key=0),
  )


@pytest.mark.parametrize(
  "mode", [pytest.param("none", marks=pytest.mark.slow), "relative"]
)
@pytest.mark.parametrize(("schedule", "vectorize"), OTHER_MODES)
def test_vectorize_modes_reach_the_same_numbers(schedule, vectorize, mode):
  expected, losses = _run(schedule=schedule, vectorize="unroll", mode=mode)
  state, got = _run(schedule=schedule, vectorize=vectorize, mode=mode)
  np.testing.assert_allclose(got, losses, rtol=1e-4)
  _assert_close(state.params, expected.params)
  _assert_close(state.batch_stats, expected.batch_stats)
  assert int(state.step) == int(expected.step) == 2


def test_norms_shared_by_all_bit_widths_train_in_every_mode():
  network = _network("shared")
  for vectorize in ("unroll", "sequential", "vmap"):
    state, losses = _run(
      schedule="accumulate", vectorize=vectorize, network=network
    )
    assert np.isfinite(losses).all()
    assert state.batch_stats["norm1"]["mean"].shape == (1, 4)
    moved = state.batch_stats["norm1"]["mean"]
    assert (moved != network.batch_stats["norm1"]["mean"]).all()


def test_statistics_of_vectorized_passes_are_means_of_those_that_changed():
  old = jnp.array([1.0, 2.0, 3.0, 0.5])
  visits = jnp.array([[5.0, 2.0, 3.0, 0.0], [7.0, 2.0, 9.0, 0.5]])
  merged = schedules._merge_statistics(old, visits)
  np.testing.assert_array_equal(merged, [6.0, 2.0, 9.0, 0.0])
  # What counts has no mean.
  counts = schedules._merge_statistics(jnp.array([3]), jnp.array([[4], [4]]))
  assert counts.dtype == jnp.int32 and counts == 4


@pytest.mark.parametrize(
  "optimizer", ["adam", pytest.param("sgd", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("mode", ["eta", "paper", "relative", "proportional"])
def test_alrs_multiplies_updates_at_a_lower_bit_width(optimizer, mode):
  """One update at 4 of (8, 4) bits, whose eta is 0.01, against plain."""
  network, rate = _network(), 1e-4
  batch = net.batch(0)

  def scales(tree):
    kinds = jax.tree.leaves(network.param_labels)
    leaves = zip(jax.tree.leaves(tree), kinds, strict=True)
    return [np.asarray(leaf) for leaf, kind in leaves if kind == "scale"]

  before = scales(network.params)

  def moved(mode):
    transform = make_optimizer(
      optimizer, param_labels=network.param_labels, momentum=0.0
    )
    trainer = make_trainer(
      network,
      transform,
      optax.constant_schedule(rate),
      vectorize="sequential",
      alrs=mode,
    )
    state = trainer.init(jax.random.key(0))
    new, *_ = trainer.program(state, batch, np.int32(1))
    return [
      new - old for new, old in zip(scales(new.params), before, strict=True)
    ]

  def loss(params):
    logits, _ = network.apply(
      params, network.batch_stats, 1, batch["image"], train=True
    )
    return cross_entropy(logits, batch["label"])

  gradients = jit(jax.grad(loss))(network.params)
  m = np.mean([min(np.abs(g).max(), 1.0) for g in scales(gradients)])
  factors = {
    "eta": [0.01] * len(before),
    "relative": [0.01 * (1 - m)] * len(before),
    "paper": [0.01 * max(rate - m, 0) / rate] * len(before),
    "proportional": before,
  }[mode]
  plain, scaled = moved("none"), moved(mode)
  assert any(np.abs(p).max() > 0 for p in plain)
  for p, s, factor, start in zip(plain, scaled, factors, before, strict=True):
    # A scale takes no smaller step than the next float.
    atol = max(2e-9, np.spacing(start).max())
    np.testing.assert_allclose(s, factor * p, rtol=0.05, atol=atol)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_alrs_scales_the_update_of_scales_and_nothing_else(optimizer):
  """After one alternate step of the first bit-width alone (eta_b = 1)."""
  network = nn.functional(net.quantized(bits=(4,)))
  batch, rate = net.batch(0), 1e-4

  def stepped(mode):
    transform = make_optimizer(
      optimizer, param_labels=network.param_labels, momentum=0.0
    )
    trainer = make_trainer(
      network, transform, optax.constant_schedule(rate), alrs=mode
    )
    return trainer.step(trainer.init(jax.random.key(0)), batch)[0].params

  plain, relative = stepped("none"), stepped("relative")

  def loss(params):
    logits, _ = network.apply(
      params, network.batch_stats, 0, batch["image"], train=True
    )
    return cross_entropy(logits, batch["label"])

  gradients = jit(jax.grad(loss))(network.params)
  kinds = jax.tree.leaves(network.param_labels)
  sizes = [
    min(float(jnp.abs(g).max()), 1.0)
    for g, kind in zip(jax.tree.leaves(gradients), kinds, strict=True)
    if kind == "scale"
  ]
  factor = 1 - np.mean(sizes)
  assert 0 < factor < 0.999
  for start, a, b, kind in zip(
    jax.tree.leaves(network.params),
    jax.tree.leaves(plain),
    jax.tree.leaves(relative),
    kinds,
    strict=True,
  ):
    expected = factor * (a - start) if kind == "scale" else a - start
    # Differences of float32 numbers near 1: absolute error of a few 1e-7.
    np.testing.assert_allclose(b - start, expected, rtol=1e-2, atol=4e-7)


@pytest.mark.slow
def test_eta_of_one_bit_width_is_plain_adam():
  network = nn.functional(net.quantized(bits=(4,)))

  def stepped(mode):
    transform = make_optimizer("adam", param_labels=network.param_labels)
    trainer = make_trainer(
      network, transform, optax.constant_schedule(1e-3), alrs=mode
    )
    state = trainer.init(jax.random.key(0))
    for number in range(3):
      state, _ = trainer.step(state, net.batch(number))
    return state.params

  jax.tree.map(np.testing.assert_array_equal, stepped("eta"), stepped("none"))
  adam = optax.adam(1e-3)
  params, stats = network.params, network.batch_stats
  opt_state = adam.init(params)
  for number in range(3):
    batch = net.batch(number)

    def loss(params, stats=stats, batch=batch):
      logits, new = network.apply(params, stats, 0, batch["image"], train=True)
      return cross_entropy(logits, batch["label"]), new

    gradients, stats = jit(jax.grad(loss, has_aux=True))(params)
    updates, opt_state = adam.update(gradients, opt_state)
    params = optax.apply_updates(params, updates)
  _assert_close(stepped("none"), params, rtol=1e-3, atol=1e-5)


def test_only_the_rows_of_a_bit_width_move_in_its_pass():
  network = _network()
  transform = make_optimizer("adam", param_labels=network.param_labels)
  trainer = make_trainer(
    network,
    transform,
    optax.constant_schedule(1e-3),
    vectorize="sequential",
  )
  state = trainer.init(jax.random.key(0))
  state, *_ = trainer.program(state, net.batch(0), np.int32(1))
  for path in (("conv1", "input_params"), ("norm2",)):
    before, after = network.params, state.params
    for key in path:
      before, after = before[key], after[key]
    moved = (
      np.asarray(before["scale"] != after["scale"])
      .reshape(len(net.BITS), -1)
      .any(1)
    )
    np.testing.assert_array_equal(moved, [False, True])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_scales_stay_positive_and_finite_at_a_rate_100_times_too_large(
  optimizer,
):
  state, _ = _run(steps=12, optimizer=optimizer, rate=5.0)
  network = _network()
  for leaf, kind in zip(
    jax.tree.leaves(state.params),
    jax.tree.leaves(network.param_labels),
    strict=True,
  ):
    if kind == "scale":
      assert (leaf >= SCALE_MIN).all() and (leaf <= SCALE_MAX).all()


@pytest.mark.parametrize(
  ("schedule", "distillation", "sampling"),
  [
    ("alternate", "none", "all"),
    ("alternate", "recursive", "sandwich"),
    ("accumulate", "recursive", "all"),
    ("accumulate", "none", "mixed"),
  ],
)
def test_sequential_compiles_once_for_all_bit_widths(
  schedule, distillation, sampling
):
  network = _four()
  transform = make_optimizer("sgd", param_labels=network.param_labels)
  trainer = make_trainer(
    network,
    transform,
    optax.constant_schedule(0.01),
    schedule=schedule,
    vectorize="sequential",
    sampling=sampling,
    distillation=distillation,
  )
  state = trainer.init(jax.random.key(0))
  for number in range(3):
    state, _ = trainer.step(state, net.batch(number))
  assert trainer.program._cache_size() == 1


FOUR = (8, 6, 4, 2)


@functools.cache
def _four():
  return nn.functional(net.quantized(bits=FOUR))


@functools.cache
def _unrolled(**options):
  options = {"vectorize": "unroll", **options}
  return _run(network=_four(), rate=1e-3, **options)


@pytest.mark.parametrize(
  "sampling",
  [
    "sandwich",
    *(pytest.param(s, marks=pytest.mark.slow) for s in ("pair", "random")),
    "mixed",
  ],
)
@pytest.mark.parametrize(("schedule", "vectorize"), OTHER_MODES)
def test_drawn_bit_widths_are_the_same_in_every_mode(
  sampling, schedule, vectorize
):
  options = dict(schedule=schedule, sampling=sampling)
  expected, losses = _unrolled(**options)
  state, got = _unrolled(**options, vectorize=vectorize)
  np.testing.assert_allclose(got, losses, rtol=1e-3)
  _assert_close(state.params, expected.params)


class Backwards(nnx.Module):
  """Two quantized layers, called in the opposite order of their names."""

  def __init__(self, rngs):
    self.stem = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.upper = nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs)
    self.lower = nnx.Conv(6, 6, (3, 3), rngs=rngs)
    self.head = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.stem(x))
    x = nnx.relu(self.upper(x))
    return self.head(self.lower(x).mean((1, 2)))


@functools.cache
def _backwards():
  model = nn.quantize(
    Backwards(nnx.Rngs(0)),
    weight=quant.double_rounding(FOUR),
    activation=quant.lsq_activation(FOUR),
    sample=net.batch()["image"],
  )
  return nn.functional(model)


def _fixed(*visits):
  """Visits of given bits of each layer."""
  return sampling.Sampling(
    labels=lambda bits: ("fixed",) * len(visits),
    draw=lambda key, candidates, layers, step: [
      jnp.array(index, jnp.int32) for index in visits
    ],
  )


@functools.cache
def _gradients_at(index):
  network, batch = _backwards(), net.batch(0)

  def loss(params, index):
    logits, _ = network.apply(
      params, network.batch_stats, index, batch["image"], train=True
    )
    return cross_entropy(logits, batch["label"])

  return jit(jax.grad(loss))(network.params, jnp.array(index, jnp.int32))


@pytest.mark.parametrize(
  ("schedule", "vectorize", "visits"),
  [
    ("alternate", "unroll", [(0, 3)]),
    ("alternate", "sequential", [(2, 0)]),
    ("accumulate", "unroll", [(0, 3), (2, 1)]),
    ("accumulate", "sequential", [(0, 3), (2, 1)]),
    ("accumulate", "vmap", [(0, 3), (2, 1)]),
  ],
)
def test_scales_have_the_learning_rate_of_their_own_layers_bits(
  schedule, vectorize, visits
):
  """Weighted by sizes of gradients where visits share a scale."""
  network, rate = _backwards(), 0.5
  state, _ = _run(
    network=network,
    steps=1,
    schedule=schedule,
    vectorize=vectorize,
    mode="eta",
    momentum=0.0,
    rate=rate,
    sampling=_fixed(*visits),
  )
  eta = (1.0, 0.1, 0.01, 0.001)
  gradients = [_gradients_at(index) for index in visits]
  for order, layer in enumerate(("upper", "lower")):
    factors = [eta[index[order]] for index in visits]
    for kind in ("input_params", "weight_params"):
      before, after, *slopes = (
        np.asarray(tree[layer][kind]["scale"])
        for tree in (network.params, state.params, *gradients)
      )
      sizes = sum(np.abs(g) for g in slopes)
      weighted = sum(
        f * np.abs(g) for f, g in zip(factors, slopes, strict=True)
      )
      pace = weighted / np.maximum(sizes, 1e-30)
      move = -rate * pace * sum(slopes)
      # New scales are rounded to half a unit in the last place.
      atol = np.spacing(before.max())
      assert np.abs(move).max() > 10 * atol
      np.testing.assert_allclose(after - before, move, rtol=5e-3, atol=atol)


def test_every_step_draws_its_own_bit_widths():
  network = _four()
  parts = _parts(network, "none", drawn="random")
  state = _initial_state(parts)

  @jax.jit
  @jax.vmap
  def drawn(step):
    return parts.indices(state._replace(step=step))[0]

  steps = jnp.arange(40)
  assert set(drawn(steps).tolist()) == {0, 1, 2, 3}
  # A resumed run draws the same again.
  np.testing.assert_array_equal(drawn(steps[7:]), drawn(steps)[7:])


def _initial_state(parts):
  trainer = make_trainer(parts.network, parts.optimizer, parts.learning_rate)
  return trainer.init(jax.random.key(0))


def _parts(network, mode, *, drawn="all", rate=0.7):
  return gradients.Parts(
    network=network,
    bits=FOUR,
    optimizer=make_optimizer("sgd", param_labels=network.param_labels),
    learning_rate=optax.constant_schedule(rate),
    alrs=mode,
    sampling=sampling.get(drawn),
    distillation=distill.get("none"),
    weights=np.ones(4, np.float32),
    steps=None,
  )


@pytest.mark.parametrize("mode", alrs.MODES)
def test_one_bit_width_for_all_layers_gives_all_scales_one_factor(mode):
  network, rate = _four(), 0.7
  parts = _parts(network, mode, rate=rate)
  state = _initial_state(parts)
  carry = gradients.Carry(state.batch_stats, state.memory, ())

  @jit
  def run(state, carry, batch, index):
    return gradients.gradients_of(parts, state, carry, batch, index, 0)[0]

  for index in (0, 2):
    got = run(state, carry, net.batch(0), jnp.int32(index))
    scales = gradients.scales_of(parts, got.params)
    factor = alrs.factor(
      mode,
      np.float32(alrs.eta(FOUR)[index]),
      alrs.gradient_size(scales),
      jnp.float32(rate),
    )
    for parameter, scale, weighted, total in zip(
      gradients.scales_of(parts, state.params),
      *(scales, got.weighted, got.total),
      strict=True,
    ):
      assert (jnp.abs(scale) > 0).any()
      np.testing.assert_array_equal(total, jnp.abs(scale))
      expected = factor * alrs.unit(mode, parameter) * total
      # XLA may compute a quotient of constants in another order.
      np.testing.assert_allclose(weighted, expected, rtol=2.5e-7)


# One scheme for every way in which passes depend on each other.
@pytest.mark.parametrize(
  "distillation",
  [
    *(
      pytest.param(scheme, marks=pytest.mark.slow)
      for scheme in ("recursive", "highest")
    ),
    "online_label_class_means",
  ],
)
@pytest.mark.parametrize(("schedule", "vectorize"), OTHER_MODES)
def test_teachers_and_memory_are_the_same_in_every_mode(
  distillation, schedule, vectorize
):
  options = dict(schedule=schedule, sampling="sandwich")
  plain, _ = _unrolled(**options)
  expected, losses = _unrolled(**options, distillation=distillation)
  state, got = _unrolled(
    **options, distillation=distillation, vectorize=vectorize
  )
  np.testing.assert_allclose(got, losses, rtol=1e-3)
  _assert_close(state.params, expected.params)
  _assert_close(state.memory, expected.memory)
  moved = max(
    float(jnp.abs(a - b).max())
    for a, b in zip(
      jax.tree.leaves(plain.params),
      jax.tree.leaves(expected.params),
      strict=True,
    )
  )
  assert moved > 1e-4  # the scheme does something


def test_a_student_learns_from_its_teacher_and_the_teacher_from_labels_alone():
  """The first update of accumulate is the sum of hand-made gradients."""
  network, rate, batch = _network(), 1e-4, net.batch(0)

  def logits(params, index):
    return network.apply(
      params, network.batch_stats, index, batch["image"], train=True
    )[0]

  teacher = jax.nn.softmax(jit(logits)(network.params, 0))

  def loss(params):
    student = jax.nn.log_softmax(logits(params, 1))
    soft = -(teacher * student).sum(-1).mean()
    return cross_entropy(logits(params, 0), batch["label"]) + soft

  gradients = jit(jax.grad(loss))(network.params)
  state, _ = _run(
    steps=1,
    schedule="accumulate",
    distillation="highest",
    momentum=0.0,
    rate=rate,
  )
  for start, g, kind, new in zip(
    *map(
      jax.tree.leaves,
      (network.params, gradients, network.param_labels, state.params),
    ),
    strict=True,
  ):
    expected = start - rate * (g + 1e-3 * start * float(kind == "weight"))
    np.testing.assert_allclose(new, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
  "vectorize",
  ["unroll", pytest.param("sequential", marks=pytest.mark.slow), "vmap"],
)
def test_memory_learns_from_the_highest_bit_width_alone(vectorize):
  network, batch = _network(), net.batch(0)
  scheme = distill.get("online_label_class_means")
  learned = []
  for index in range(2):
    logits, _ = jit(functools.partial(network.apply, train=True))(
      network.params, network.batch_stats, jnp.int32(index), batch["image"]
    )
    learned.append(
      scheme.learn(scheme.init(3), logits, batch["label"])["means"]
    )
  state, _ = _run(
    steps=1,
    schedule="accumulate",
    vectorize=vectorize,
    distillation="online_label_class_means",
  )
  np.testing.assert_allclose(state.memory["means"], learned[0], atol=1e-6)
  assert np.abs(learned[0] - learned[1]).max() > 1e-4


@pytest.mark.parametrize(
  "vectorize",
  ["unroll", pytest.param("sequential", marks=pytest.mark.slow), "vmap"],
)
def test_loss_weights_multiply_gradients_and_not_reported_losses(vectorize):
  network, rate, batch = _network(), 1e-3, net.batch(0)
  stats, total = network.batch_stats, None
  for index, weight in enumerate((0.1, 3.0)):
    g, stats = _direct_gradients(network.params, stats, index, batch)
    g = jax.tree.map(lambda x, weight=weight: weight * x, g)
    total = g if total is None else jax.tree.map(jnp.add, total, g)
  options = dict(
    steps=1, schedule="accumulate", momentum=0.0, rate=rate, vectorize=vectorize
  )
  _, plain = _run(**options)
  state, losses = _run(**options, loss_weights=(0.1, 3.0))
  np.testing.assert_allclose(losses, plain, rtol=1e-5)
  for start, g, kind, new in zip(
    *map(
      jax.tree.leaves,
      (network.params, total, network.param_labels, state.params),
    ),
    strict=True,
  ):
    expected = start - rate * (g + 1e-3 * start * float(kind == "weight"))
    np.testing.assert_allclose(new, expected, rtol=1e-4, atol=2e-6)


def test_layers_of_several_bit_widths_weigh_the_mean_of_theirs():
  weights = np.array([1.0, 3.0, 8.0], np.float32)
  assert gradients._mean_entry(weights, 1) == 3.0
  assert gradients._mean_entry(weights, jnp.array([0, 1, 2], jnp.int32)) == 4.0


@functools.cache
def _layers(build):
  """Quantized layers of a network: all but the first and the last."""
  model = nnx.eval_shape(lambda: build(num_classes=10, rngs=nnx.Rngs(0)))
  layers = (nnx.Conv, nnx.Linear)
  return sum(isinstance(m, layers) for _, m in nnx.iter_modules(model)) - 2


@pytest.mark.parametrize(
  ("backend", "schedule", "mode"),
  [
    ("cpu", "alternate", "unroll"),
    ("cpu", "accumulate", "sequential"),
    ("gpu", "alternate", "unroll"),
    ("gpu", "accumulate", "unroll"),
  ],
)
def test_auto_unrolls_small_networks_where_that_is_faster(
  monkeypatch, backend, schedule, mode
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  size = {"layers": _layers(models.resnet20), "passes": 4}
  assert size["layers"] == 20
  assert schedules.resolve_vectorize("auto", schedule, **size) == mode
  assert schedules.resolve_vectorize("vmap", "accumulate", **size) == "vmap"


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_auto_never_unrolls_a_network_that_would_compile_for_minutes(
  monkeypatch, backend, schedule
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  size = {"layers": _layers(models.resnet50), "passes": 4}
  assert size["layers"] == 52
  mode = schedules.resolve_vectorize("auto", schedule, **size)
  assert mode == "sequential"


@pytest.mark.parametrize(
  ("schedule", "vectorize", "traces"),
  [
    ("alternate", "unroll", 2),
    ("alternate", "sequential", 1),
    ("accumulate", "sequential", 1),
  ],
)
def test_every_pass_that_is_compiled_traces_the_network_once(
  monkeypatch, schedule, vectorize, traces
):
  """And lowering is of the program that steps run, not of one more."""
  trainer = _trainer(schedule=schedule, vectorize=vectorize)
  calls, call = [], net.Net.__call__

  def counted(self, x):
    calls.append(x)
    return call(self, x)

  monkeypatch.setattr(net.Net, "__call__", counted)
  state, batch = trainer.init(jax.random.key(0)), net.batch()
  trainer.lower(state, batch)
  assert len(calls) == traces
  trainer.step(state, batch)
  assert len(calls) == traces


def test_progress_makes_the_target_softer_along_the_run():
  options = dict(network=_four(), distillation="progressive")
  _, losses = _run(**options, steps=1, rate=0.0, steps_in_run=10)
  _, ended = _run(**options, steps=1, rate=0.0, steps_in_run=1)
  assert losses[0, 0] == ended[0, 0]  # the highest learns from labels
  assert abs(losses[0, 1:] - ended[0, 1:]).min() > 1e-5


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"sampling": "roulette"}, "sampling.*roulette"),
    ({"distillation": "teacher"}, "distillation.*teacher"),
    (
      {"loss_weights": (1.0,)},
      r"loss_weights must be 2 numbers.* got \(1.0,\)",
    ),
    ({"schedule": "random"}, "schedule must be one of .* got 'random'"),
    ({"vectorize": "scan"}, "vectorize must be one of .* got 'scan'"),
    ({"vectorize": "vmap"}, "vectorize must not be 'vmap' with"),
    ({"mode": "fast"}, "alrs must be one of .* got 'fast'"),
  ],
)
def test_unknown_names_are_errors_that_list_the_known(options, message):
  with pytest.raises(ValueError, match=message):
    _run(**options)
