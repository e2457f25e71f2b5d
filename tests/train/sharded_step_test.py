"""A step spread over devices is the step of one device.

Equal up to the order of float32 sums: devices add their shares of a batch in
another order. A last bit can move a value to the next code; three steps of
this small network stay below 1e-3 of the largest change.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_network as net
from jax.sharding import PartitionSpec as P

from dr_jax import nn, train
from dr_jax.benchmarks.throughput import MODES
from dr_jax.runtime import sharding
from dr_jax.train import gradients
from dr_jax.train import state as states

# A step compiles once per bit-width where its passes are unrolled; four are
# needed only where devices are along the axis of bit-widths.
BITS, FOUR = (8, 4), (8, 6, 4, 2)
STEPS = 3


@functools.cache
def network(bits=BITS):
  """Scales off their start, where the largest weight is just inside."""
  split = nn.functional(net.quantized(bits))
  params = jax.tree.map(
    lambda p, kind: p * 1.03 if kind == "scale" else p,
    split.params,
    split.param_labels,
  )
  return split._replace(params=params)


def stepped(layout, *, steps=STEPS, bits=BITS, **options):
  start = network(bits)
  optimizer = train.make_optimizer(
    "sgd", param_labels=start.param_labels, weight_decay=1e-4
  )
  trainer = train.make_trainer(
    start,
    optimizer,
    optax.constant_schedule(0.05),
    alrs="relative",
    steps=10,
    layout=layout,
    num_classes=3,
    **options,
  )
  put = layout.shard_batch if layout is not None else lambda b: b
  state, losses = trainer.init(jax.random.key(0)), []
  for number in range(steps):
    batch = put(net.batch(number, size=16))
    state, loss, logged = trainer.logged_step(state, batch)
    norms = logged["scale_gradient_norm"]
    assert norms.shape == loss.shape and (norms > 0).all()
    # Every process can read them.
    assert loss.is_fully_replicated and norms.is_fully_replicated
    losses.append(np.asarray(loss))
  return state, np.array(losses), trainer


@functools.cache
def alone(**options):
  """The step of one device."""
  return stepped(None, **options)


def assert_same(found, expected, bits=BITS):
  for a, b in zip(found[1], expected[1], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4)
  start = network(bits)
  before = jax.tree.leaves((start.params, start.batch_stats))
  pairs = zip(
    before,
    jax.tree.leaves((found[0].params, found[0].batch_stats)),
    jax.tree.leaves((expected[0].params, expected[0].batch_stats)),
    strict=True,
  )
  largest = 0
  for old, a, b in pairs:
    moved = np.abs(np.asarray(b) - np.asarray(old)).max(initial=0)
    largest = max(largest, moved)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3 * moved + 1e-7)
  assert largest > 0.01  # The comparison is of something that has moved.


# Unrolled passes, which compile longest, only in the slow run.
SOME_MODES = [
  pytest.param(*mode, marks=pytest.mark.slow)
  if mode[1] == "unroll" or mode == ("accumulate", "sequential")
  else mode
  for mode in MODES
]


# Sharded parameters need all that replicated ones do.
PARAMETERS = [pytest.param("replicated", marks=pytest.mark.slow), "sharded"]


@pytest.mark.parametrize(("schedule", "vectorize"), SOME_MODES)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_a_batch_over_four_devices_trains_as_on_one(
  schedule, vectorize, parameters
):
  options = {"schedule": schedule, "vectorize": vectorize}
  layout = sharding.layout(data=4, parameters=parameters)._replace(smallest=16)
  found = stepped(layout, **options)
  assert_same(found, alone(**options))
  kernel = found[0].params["conv1"]["kernel"]
  assert kernel.sharding.is_fully_replicated == (parameters == "replicated")
  for leaf in jax.tree.leaves(found[0]):
    assert leaf.sharding.device_set == set(layout.mesh.devices.flat)


@pytest.mark.parametrize(("schedule", "vectorize"), SOME_MODES)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_a_step_donates_the_buffers_of_its_state(
  schedule, vectorize, parameters
):
  layout = sharding.layout(data=2, parameters=parameters)._replace(smallest=16)
  optimizer = train.make_optimizer("sgd", param_labels=network().param_labels)
  trainer = train.make_trainer(
    network(),
    optimizer,
    optax.constant_schedule(0.05),
    schedule=schedule,
    vectorize=vectorize,
    layout=layout,
  )
  before = trainer.init(jax.random.key(0))
  trainer.step(before, layout.shard_batch(net.batch(0, size=16)))
  for leaf in jax.tree.leaves((before.params, before.opt_state)):
    assert leaf.is_deleted()


@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_what_one_pass_returns_stays_where_the_next_one_takes_it(
  schedule, caplog
):
  """Otherwise every pass would be another program."""
  options = {
    "schedule": schedule,
    "vectorize": "sequential",
    "distillation": "recursive",
    "steps": 2,
  }
  layout = sharding.layout(data=4, parameters="sharded")._replace(smallest=16)
  with jax.log_compiles():
    found = stepped(layout, **options)
  names = ("Compiling jit(run_pass)", "Compiling jit(accumulate)")
  assert sum(text.startswith(names) for text in caplog.messages) == 1
  assert_same(found, alone(**options))


def test_sums_and_what_passes_hand_on_are_donated():
  _, _, trainer = stepped(
    None, steps=0, schedule="accumulate", vectorize="sequential"
  )
  lowered = trainer.lower(_state(), net.batch(0, size=16))
  (state, carry, summed, *_), _ = lowered.args_info
  assert all(leaf.donated for leaf in jax.tree.leaves((carry, summed)))
  # The parameters are needed for the next pass.
  assert not any(leaf.donated for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
  "shape", [{"bits": 4}, {"data": 2, "bits": 2}], ids=["bits", "data_x_bits"]
)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_bit_widths_over_devices_train_as_on_one(shape, parameters):
  options = {"schedule": "accumulate", "vectorize": "vmap", "bits": FOUR}
  layout = sharding.layout(**shape, parameters=parameters)
  found = stepped(layout._replace(smallest=16), **options)
  assert_same(found, alone(**options), FOUR)


@pytest.mark.parametrize(
  "distillation",
  [
    "recursive",
    pytest.param("progressive", marks=pytest.mark.slow),
    "online_label_class_means",
  ],
)
def test_teachers_reach_students_on_other_devices(distillation):
  options = {
    "schedule": "accumulate",
    "vectorize": "vmap",
    "distillation": distillation,
    "bits": FOUR,
  }
  layout = sharding.layout(bits=4)
  taught = alone(**options)
  assert_same(stepped(layout, **options), taught, FOUR)
  plain = alone(**{**options, "distillation": "none"})
  assert np.abs(taught[1] - plain[1]).max() > 1e-3


def test_every_device_group_computes_its_own_bit_widths_only():
  """The compiled program of 4 devices holds one pass, not four."""

  def convolutions(layout):
    state, _, trainer = stepped(
      layout, steps=0, schedule="accumulate", vectorize="vmap", bits=FOUR
    )
    data = net.batch(0, size=16)
    if layout is not None:
      data = layout.shard_batch(data)
    return trainer.lower(state, data).compile().cost_analysis()["flops"]

  alone, spread = convolutions(None), convolutions(sharding.layout(bits=4))
  assert spread < 0.35 * alone


@pytest.mark.parametrize(("schedule", "vectorize"), SOME_MODES)
def test_per_device_norms_are_means_over_shards_of_the_batch(
  schedule, vectorize
):
  options = {"schedule": schedule, "vectorize": vectorize, "steps": 1}
  layout = sharding.layout(data=2, norm="per_device")
  state, losses, _ = stepped(layout, **options)
  whole = net.batch(0, size=16)
  expected = []
  for start in (0, 8):
    shard = {name: array[start : start + 8] for name, array in whole.items()}
    logits, stats = network().apply(
      network().params, network().batch_stats, 0, shard["image"], train=True
    )
    loss = train.cross_entropy(logits, shard["label"])
    expected.append((loss, stats["norm2"]["mean"][0]))
  mean_loss = np.mean([loss for loss, _ in expected])
  np.testing.assert_allclose(losses[0, 0], mean_loss, rtol=1e-5)
  found = np.asarray(state.batch_stats["norm2"]["mean"])[0]
  np.testing.assert_allclose(
    found, np.mean([m for _, m in expected], axis=0), rtol=1e-4, atol=1e-6
  )
  # Each device's own variance is smaller than that of the whole batch.
  together, *_ = stepped(sharding.layout(data=2), **options)
  assert not np.allclose(
    state.batch_stats["norm2"]["var"][0],
    together.batch_stats["norm2"]["var"][0],
    rtol=1e-4,
  )


def test_per_device_norms_are_the_same_with_bit_widths_over_devices():
  options = {"schedule": "accumulate", "vectorize": "vmap", "steps": 1}
  layouts = [
    sharding.layout(data=2, bits=bits, norm="per_device") for bits in (1, 2)
  ]
  assert_same(*(stepped(layout, **options) for layout in layouts))


def test_per_device_gradients_are_means_over_shards_of_the_batch():
  layout = sharding.layout(data=2, norm="per_device")
  options = {"schedule": "accumulate", "vectorize": "sequential"}
  state, *_ = stepped(layout, steps=1, **options)
  whole, start, gradients = net.batch(0, size=16), network(), []
  for index in range(len(BITS)):
    for first in (0, 8):
      shard = {n: array[first : first + 8] for n, array in whole.items()}

      def loss(params, index=index, shard=shard):
        logits, _ = start.apply(
          params, start.batch_stats, index, shard["image"], train=True
        )
        return train.cross_entropy(logits, shard["label"])

      gradients.append(jax.jit(jax.grad(loss))(start.params))
  for path in (("head", "kernel"), ("conv1", "kernel"), ("stem", "kernel")):
    at = lambda tree: np.asarray(tree[path[0]][path[1]])  # noqa: B023, E731
    before = at(start.params)
    total = sum(map(at, gradients)) / 2 + 1e-4 * before
    # SGD's first step; activations round to codes: single entries differ.
    np.testing.assert_allclose(
      at(state.params) - before, -0.05 * total, rtol=2e-3, atol=2e-5
    )


def test_per_device_sums_of_all_kinds_are_one_array_on_a_cpu():
  """Each array of each sum would be a message of its own."""
  layout = sharding.layout(data=2, norm="per_device")
  options = {"schedule": "alternate", "vectorize": "sequential"}
  state, _, trainer = stepped(layout, steps=0, **options)
  batch = layout.shard_batch(net.batch(0, size=16))
  text = trainer.lower(state, batch).compile().as_text()
  (operation,) = re.findall(r"= (.*) all-reduce\(", text)
  floats = jax.tree.leaves((state.params, state.batch_stats))
  size = sum(leaf.size for leaf in floats if leaf.dtype == jnp.float32)
  # And the loss, weighted and plain.
  assert operation.startswith(f"f32[{size + 2}]")


def test_means_over_devices_keep_types_and_leave_integers():
  layout = sharding.layout(data=2)
  tree = {
    "kernel": jnp.arange(12, dtype=jnp.float32).reshape(2, 6),
    "half": jnp.array([[1.0, 2.0], [3.0, 8.0]], jnp.bfloat16),
    "bias": jnp.array([[1.0], [4.0]], jnp.float32),
  }
  count = jnp.int32(7)
  found, kept = jax.jit(
    jax.shard_map(
      gradients.mean_over_devices,
      mesh=layout.mesh,
      in_specs=((P("data"), P()),),
      out_specs=(P(), P()),
    )
  )((tree, count))
  assert kept == 7 and kept.dtype == jnp.int32
  for name, leaf in tree.items():
    assert found[name].dtype == leaf.dtype
    want = np.asarray(leaf, np.float32).mean(0, keepdims=True)
    np.testing.assert_array_equal(np.asarray(found[name], np.float32), want)


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize(
  "shape", [{"data": 4}, {"data": 2, "bits": 2}], ids=str
)
def test_one_program_serves_every_step(shape, parameters, caplog):
  layout = sharding.layout(**shape, parameters=parameters)
  with jax.log_compiles():
    stepped(
      layout._replace(smallest=16), schedule="accumulate", vectorize="vmap"
    )
  compiled = [r for r in caplog.messages if r.startswith("Compiling jit(step)")]
  assert len(compiled) == 1


@pytest.mark.parametrize(
  ("shape", "options", "message"),
  [
    (
      {"bits": 4},
      {"schedule": "alternate"},
      "bits must be 1 device with .*vmap",
    ),
    (
      {"bits": 4},
      {"schedule": "accumulate", "vectorize": "vmap", "sampling": "pair"},
      "bits must be a divisor of 2, .* got 4",
    ),
    (
      {"bits": 2},
      {
        "schedule": "accumulate",
        "vectorize": "vmap",
        "distillation": "highest",
      },
      "bits must be 1 or 4 devices with a distillation.* got 2",
    ),
    (
      {"norm": "per_device"},
      {
        "schedule": "accumulate",
        "vectorize": "vmap",
        "distillation": "highest",
      },
      "norm must be 'global' .*vmap.* got 'per_device'",
    ),
    (
      {"norm": "per_device"},
      {"distillation": "online_label_class_means"},
      "norm must be 'global' .*memory.* got 'per_device'",
    ),
  ],
)
def test_layouts_that_do_not_fit_are_named(shape, options, message):
  with pytest.raises(ValueError, match=message):
    stepped(sharding.layout(**shape), bits=FOUR, **options)


def test_a_sharded_state_continues_with_the_same_random_numbers():
  key = jax.random.key(3, impl="rbg")
  state = _state()._replace(key=key)
  placed = states.shard_state(sharding.layout(data=2), state)
  assert placed.key.dtype == key.dtype
  assert jax.random.bits(placed.key) == jax.random.bits(key)


def test_parameters_and_their_optimizer_state_are_sharded_and_nothing_else():
  layout = sharding.layout(data=4, parameters="sharded")._replace(smallest=16)
  state = states.shard_state(layout, _state())
  cut = lambda leaf: not leaf.sharding.is_fully_replicated  # noqa: E731
  kernels = [
    leaf
    for path, leaf in jax.tree.leaves_with_path(state)
    if jax.tree_util.keystr(path).endswith("['conv1']['kernel']")
  ]
  assert len(kernels) == 2 and all(map(cut, kernels))
  assert not any(
    map(cut, jax.tree.leaves((state.batch_stats, state.step, state.key)))
  )
  # A teacher's logits are with their images.
  carry = gradients.Carry(state.batch_stats, {}, jnp.zeros((16, 3)))
  assert carry.shardings(layout).teacher == layout.batch


def test_gathered_parameters_are_those_that_were_sharded():
  layout = sharding.layout(data=4, parameters="sharded")._replace(smallest=16)
  params = states.shard_state(layout, _state()).params
  back = states.gather(layout, params)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), back, network().params)
  )
  for leaf in jax.tree.leaves(back):
    assert leaf.sharding.device_set == {jax.local_devices()[0]}
    assert not leaf.committed


def _state():
  optimizer = train.make_optimizer("sgd", param_labels=network().param_labels)
  trainer = train.make_trainer(
    network(), optimizer, optax.constant_schedule(0.05)
  )
  return trainer.init(jax.random.key(0))
