"""The functional view: one pure function over plain arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dr_jax import nn, quant
from tests.support.stacked_network import ConvBlock, Scanned

BITS = (8, 4, 2)
ASSIGNMENT = (2, 8, 4, 2)


class Net(nnx.Module):
  """Two branches, norms before and after, a list, a dropout and a head."""

  def __init__(self, rngs):
    self.convs = nnx.List(
      nnx.Conv(c, 4, (3, 3), use_bias=False, rngs=rngs) for c in (2, 4)
    )
    self.norm1 = nnx.BatchNorm(4, rngs=rngs)
    self.shortcut = nnx.Conv(4, 4, (1, 1), rngs=rngs)
    self.norm2 = nnx.BatchNorm(4, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm1(self.convs[0](x)))
    x = self.norm2(self.convs[1](x)) + self.shortcut(x)
    return self.head(x.mean((1, 2)))


LAYERS = ["convs/0", "convs/1", "shortcut", "head"]


def images(n=4, seed=0):
  x = np.random.default_rng(seed).normal(size=(n, 4, 4, 2))
  return jnp.asarray(x, jnp.float32)


@functools.cache
def built(weight="double_rounding"):
  return nn.quantize(
    Net(nnx.Rngs(0)),
    weight=quant.get(weight, bits=BITS),
    activation=quant.lsq_activation(BITS),
    sample=images(),
    skip=(),
  )


@pytest.fixture
def model():
  # A clone, so that tests may change it.
  return nnx.clone(built())


def at(model, bits):
  model = nnx.clone(model)
  nn.set_bits(model, bits)
  model.eval()
  return np.asarray(nnx.jit(lambda m, x: m(x))(model, images()))


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def compiled(split, static=False):
  """apply as index -> output, and a list that grows with each trace."""
  traces = []

  def run(index, params, stats, x):
    traces.append(index)
    return split.apply(params, stats, index, x)[0]

  run = jax.jit(run, static_argnums=(0,) if static else ())
  return (
    lambda index, x=None: np.asarray(
      run(index, split.params, split.batch_stats, images() if x is None else x)
    ),
    traces,
  )


def leaves(tree, prefix=""):
  """Flattens a tree of plain dicts with string keys; others fail here."""
  assert type(tree) is dict
  for key, value in tree.items():
    assert type(key) is str
    if type(value) is dict:
      yield from leaves(value, f"{prefix}{key}/")
    else:
      yield f"{prefix}{key}", value


def test_apply_is_the_model_at_a_number_for_every_bit_width(model):
  run, _ = compiled(nn.functional(model), static=True)
  for index, bits in enumerate(BITS):
    close(run(index), at(model, bits))


def test_apply_is_the_model_at_a_traced_scalar_and_at_one_vector(model):
  run, traces = compiled(nn.functional(model))
  for index, bits in enumerate(BITS):
    close(run(jnp.int32(index)), at(model, bits))
  assert len(traces) == 1
  bits = dict(zip(LAYERS, ASSIGNMENT, strict=True))
  vector = jnp.asarray([BITS.index(b) for b in ASSIGNMENT], jnp.int32)
  close(run(vector), at(model, bits))
  assert [row.name for row in nn.layer_table(model)] == LAYERS


def test_one_compilation_serves_all_assignments(model):
  run, traces = compiled(nn.functional(model))
  outputs = {
    index: run(jnp.asarray(index, jnp.int32))
    for index in np.ndindex((len(BITS),) * len(LAYERS))
  }
  assert len(outputs) == 81 and len(traces) == 1
  # The bits of every layer matter.
  for layer in range(len(LAYERS)):
    for position in (1, 2):
      index = tuple(np.eye(len(LAYERS), dtype=int)[layer] * position)
      assert not np.array_equal(outputs[index], outputs[0, 0, 0, 0])


def test_a_tuple_of_numbers_is_an_assignment_too(model):
  run, _ = compiled(nn.functional(model), static=True)
  bits = dict(zip(LAYERS, ASSIGNMENT, strict=True))
  close(run(tuple(BITS.index(b) for b in ASSIGNMENT)), at(model, bits))


def test_norms_use_the_row_of_the_layer_they_follow(model):
  split = nn.functional(model)
  rows = np.arange(12, dtype=np.float32).reshape(3, 4)
  split.params["norm1"]["bias"] = jnp.asarray(rows)
  split.params["convs"]["0"]["kernel"] *= 0
  split.params["convs"]["1"]["kernel"] *= 0
  split.params["norm2"]["bias"] *= 0
  split.params["shortcut"]["bias"] = jnp.arange(4.0)
  split.params["head"]["kernel"] *= 0
  # Only the norms matter now: look at what reaches the last activation.
  run, _ = compiled(split)
  first = run(jnp.asarray([0, 0, 0, 0], jnp.int32))
  for row in (1, 2):
    same = run(jnp.asarray([row, 0, 0, 0], jnp.int32))
    np.testing.assert_array_equal(first, same)
  split.params["head"]["kernel"] = jnp.ones((4, 3))
  by_first = [run(jnp.asarray([i, 0, 0, 0], jnp.int32)) for i in range(3)]
  assert not np.array_equal(by_first[0], by_first[1])
  assert not np.array_equal(by_first[1], by_first[2])
  # norm2 follows convs/1; its rows are equal, so convs/1 changes nothing.
  same = run(jnp.asarray([0, 2, 0, 0], jnp.int32))
  np.testing.assert_array_equal(by_first[0], same)


def test_vmap_over_the_index_equals_separate_runs(model):
  split = nn.functional(model)
  run, _ = compiled(split)

  def loss(params, index):
    y, stats = split.apply(
      params, split.batch_stats, index, images(), train=True
    )
    return jnp.square(y).sum(), (y, stats)

  step = jax.grad(loss, has_aux=True)
  together = jax.jit(jax.vmap(step, (None, 0)))
  grads, (y, stats) = together(split.params, jnp.arange(3))
  alone = jax.jit(step)
  for index in range(3):
    expected = alone(split.params, jnp.int32(index))
    got = jax.tree.map(lambda v, i=index: v[i], (grads, (y, stats)))
    jax.tree.map(lambda a, b: close(a, b, 1e-4), got, expected)


def test_training_updates_statistics_and_evaluation_does_not(model):
  split = nn.functional(model)

  @functools.partial(jax.jit, static_argnums=0)
  def run(train):
    return split.apply(
      split.params, split.batch_stats, 1, images(), train=train
    )

  _, stats = run(False)
  jax.tree.map(np.testing.assert_array_equal, stats, split.batch_stats)
  _, stats = run(True)
  for name, value in leaves(stats):
    assert not np.array_equal(value, dict(leaves(split.batch_stats))[name])


@pytest.mark.parametrize("weight", ["double_rounding", "lsq"])
def test_gradients_flow_to_every_parameter(weight):
  split = nn.functional(built(weight))

  def loss(params, index):
    y, _ = split.apply(params, split.batch_stats, index, images(), train=True)
    return jnp.square(y - 1).sum()

  gradient = jax.jit(jax.grad(loss))
  kinds = dict(leaves(split.param_labels))
  totals = [
    dict(leaves(gradient(split.params, jnp.int32(i)))) for i in (0, 1, 2)
  ]
  for name, kind in kinds.items():
    per_bits = [np.asarray(total[name]) for total in totals]
    assert all(np.isfinite(g).all() for g in per_bits), name
    if kind == "norm" or "input_params" in name:
      # One row per bit-width: each gets its own gradient and no other.
      for index, g in enumerate(per_bits):
        rows = [r for r in range(3) if np.abs(g[r]).sum() > 0]
        assert rows == [index], name
    else:
      assert all(np.abs(g).sum() > 0 for g in per_bits), name
  assert {"scale", "norm", "weight", "vector"} == set(kinds.values())


def test_gradients_are_the_same_for_a_number_and_a_traced_index(model):
  split = nn.functional(model)

  def loss(params, index):
    y, _ = split.apply(params, split.batch_stats, index, images(), train=True)
    return jnp.square(y - 1).sum()

  traced = jax.jit(jax.grad(loss))(split.params, jnp.int32(2))
  number = jax.jit(jax.grad(loss), static_argnums=1)(split.params, 2)
  jax.tree.map(lambda a, b: close(a, b, 1e-4), traced, number)


def test_params_are_plain_dicts_of_arrays_with_string_keys(model):
  split = nn.functional(model)
  names = {
    *("convs/0/kernel", "convs/1/kernel"),
    *("shortcut/kernel", "shortcut/bias", "head/kernel", "head/bias"),
    *(f"norm{i}/{part}" for i in (1, 2) for part in ("scale", "bias")),
    *(
      f"{layer}/{part}/scale"
      for layer in LAYERS
      for part in ("weight_params", "input_params")
    ),
  }
  params = dict(leaves(split.params))
  assert set(params) == names
  assert all(isinstance(value, jax.Array) for value in params.values())
  stats = dict(leaves(split.batch_stats))
  assert set(stats) == {
    f"norm{i}/{part}" for i in (1, 2) for part in ("mean", "var")
  }
  assert all(isinstance(value, jax.Array) for value in stats.values())


@pytest.mark.parametrize(
  "make", [Scanned, functools.partial(Scanned, ConvBlock, features=4)]
)
def test_biases_and_norms_with_several_axes_are_vectors(make):
  labels = dict(leaves(nn.functional(make()).param_labels))
  names = {path.split("/")[-1]: label for path, label in labels.items()}
  assert names == {"bias": "vector", "kernel": "weight", "scale": "vector"}


def test_biases_of_attention_are_vectors():
  model = nnx.MultiHeadAttention(2, 6, rngs=nnx.Rngs(0))
  labels = nn.functional(model).param_labels
  assert labels["query"] == {"bias": "vector", "kernel": "weight"}


def test_param_labels_say_what_each_parameter_is(model):
  split = nn.functional(model)
  kinds = dict(leaves(split.param_labels))
  assert set(kinds) == set(dict(leaves(split.params)))
  for name, kind in kinds.items():
    *_, owner, leaf = name.split("/")
    if owner in ("weight_params", "input_params"):
      assert kind == "scale"
    elif owner.startswith("norm"):
      assert kind == "norm"
    else:
      assert kind == {"kernel": "weight", "bias": "vector"}[leaf]


def test_a_float_network_is_a_function_too_and_ignores_the_index():
  model = Net(nnx.Rngs(0))
  split = nn.functional(model)
  model.eval()
  expected = nnx.jit(lambda m, x: m(x))(model, images())
  for index in (0, jnp.int32(5), jnp.arange(3)):
    y, _ = jax.jit(split.apply)(
      split.params, split.batch_stats, index, images()
    )
    close(y, expected)
  kinds = dict(leaves(split.param_labels))
  assert kinds["norm1/scale"] == kinds["norm1/bias"] == "vector"
  assert kinds["convs/0/kernel"] == "weight"


def test_later_changes_to_the_model_do_not_reach_the_function(model):
  split = nn.functional(model)
  before = jax.tree.map(np.asarray, (split.params, split.batch_stats))
  run, _ = compiled(split, static=True)
  expected = run(0)
  nn.set_bits(model, 2)
  model.train()
  model(images())
  model.head.kernel[...] = model.head.kernel[...] + 1
  jax.tree.map(
    np.testing.assert_array_equal, (split.params, split.batch_stats), before
  )
  again, _ = compiled(split, static=True)
  np.testing.assert_array_equal(again(0), expected)


def test_applying_the_function_does_not_change_the_model(model):
  split = nn.functional(model)
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
  split.apply(split.params, split.batch_stats, 2, images(), train=True)
  after = nnx.to_pure_dict(nnx.state(model))
  jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("shape", [(1,), (3,), (5,), (4, 1)])
def test_an_index_for_another_number_of_layers_is_an_error(model, shape):
  split = nn.functional(model)
  with pytest.raises(
    ValueError, match=r"index must have shape \(\) or \(4,\), one for each"
  ):
    split.apply(
      split.params, split.batch_stats, jnp.zeros(shape, jnp.int32), images()
    )


@pytest.mark.parametrize("index", [-1, 3])
def test_a_number_outside_the_candidates_is_an_error(model, index):
  split = nn.functional(model)
  with pytest.raises(
    ValueError, match=f"index must be in 0..2, .* got {index}"
  ):
    split.apply(split.params, split.batch_stats, index, images())


def equations(jaxpr):
  """Names of all primitives, inner programs included."""
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def test_constants_fold_when_the_index_is_a_number(model):
  split = nn.functional(model)

  def names(index, static):
    trace = jax.make_jaxpr(split.apply, static_argnums=(2,) if static else ())
    closed = trace(split.params, split.batch_stats, index, images())
    return list(equations(closed.jaxpr))

  number, traced = names(1, True), names(jnp.int32(1), False)
  look_ups = {"gather", "dynamic_slice"}
  assert not look_ups & set(number)
  assert look_ups & set(traced)
  assert len(number) < len(traced)
  # At the highest bit-width there is no second rounding either.
  assert len(names(0, True)) < len(number)


def test_update_writes_parameters_and_statistics_back(model):
  split = nn.functional(model)
  params = jax.tree.map(lambda v: v * 1.5 + 0.25, split.params)
  stats = jax.tree.map(lambda v: v + 0.5, split.batch_stats)
  nn.set_bits(model, 4)
  nn.update(model, params=params, batch_stats=stats)
  again = nn.functional(model)
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  jax.tree.map(np.testing.assert_array_equal, again.batch_stats, stats)
  assert [row.bits for row in nn.layer_table(model)] == [4] * 4
  expected, _ = jax.jit(split.apply, static_argnums=2)(
    params, stats, 1, images()
  )
  close(at(model, 4), expected)


def test_arrays_from_a_checkpoint_train_on_as_before(model):
  split = nn.functional(model)
  plain = jax.tree.map(np.asarray, (split.params, split.batch_stats))
  nn.update(model, params=plain[0], batch_stats=plain[1])
  model.train()
  assert model(images()).shape == (4, 3)
  _, stats = split.apply(*plain, 1, images(), train=True)
  assert isinstance(stats["norm1"]["mean"], jax.Array)


def damaged(tree, path, value=None):
  """A copy of nested dicts with one leaf replaced, or taken out."""
  *parents, last = path.split("/")
  copy = jax.tree.map(lambda v: v, tree)
  node = functools.reduce(lambda node, key: node[key], parents, copy)
  if value is None:
    del node[last]
  else:
    node[last] = value
  return copy


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    (
      "head/kernel",
      jnp.ones((3, 4)),
      r"head/kernel must have shape \(4, 3\), got \(3, 4\)",
    ),
    ("convs/1/weight_params/scale", jnp.ones(()), "convs/1/weight_params"),
    (
      "norm2/bias",
      jnp.ones(4),
      r"norm2/bias must have shape \(3, 4\), got \(4,\)",
    ),
    ("head/bias", None, "head/bias must be an array, but is missing"),
    ("convs/0", None, "convs/0/.*missing"),
    ("shortcut", jnp.ones(3), "shortcut/.*missing"),
    ("extra", jnp.ones(3), "extra: not in this network"),
  ],
)
def test_update_rejects_other_parameters_and_changes_nothing(
  model, path, value, message
):
  split = nn.functional(model)
  shifted = jax.tree.map(lambda v: v + 1, (split.params, split.batch_stats))
  with pytest.raises(ValueError, match=message):
    nn.update(
      model, params=damaged(shifted[0], path, value), batch_stats=shifted[1]
    )
  after = nn.functional(model)
  jax.tree.map(np.testing.assert_array_equal, after.params, split.params)


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("norm1/mean", None, "norm1/mean must be an array, but is missing"),
    (
      "norm1/var",
      jnp.ones((1, 4)),
      r"norm1/var must have shape \(3, 4\), got \(1, 4\)",
    ),
  ],
)
def test_update_rejects_other_statistics_and_changes_nothing(
  model, path, value, message
):
  split = nn.functional(model)
  params = jax.tree.map(lambda v: v + 1, split.params)
  stats = damaged(split.batch_stats, path, value)
  with pytest.raises(ValueError, match=message):
    nn.update(model, params=params, batch_stats=stats)
  after = nn.functional(model)
  jax.tree.map(np.testing.assert_array_equal, after.params, split.params)


def test_the_random_state_of_dropout_moves_on_in_training():
  class Dropped(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(4, 4, rngs=rngs)
      self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
      return self.dropout(self.linear(x))

  x = jnp.ones((3, 4))
  model = nn.quantize(
    Dropped(nnx.Rngs(0)),
    weight=quant.double_rounding(BITS),
    sample=x,
    skip=(),
  )
  split = nn.functional(model)
  run = jax.jit(functools.partial(split.apply, train=True))
  y1, stats = run(split.params, split.batch_stats, 0, x)
  y2, later = run(split.params, stats, 0, x)
  assert not np.array_equal(y1, y2)
  # From the same state, the same numbers.
  np.testing.assert_array_equal(run(split.params, stats, 0, x)[0], y2)
  nn.update(model, params=split.params, batch_stats=later)
  calm, _ = jax.jit(split.apply)(split.params, stats, 0, x)
  assert np.all(np.asarray(calm) != 0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_gives_the_numbers_of_one_device(model, axis_type):
  split = nn.functional(model)
  x = images(8, seed=1)

  def loss(params, stats, index, x):
    y, stats = split.apply(params, stats, index, x, train=True)
    return jnp.square(y - 1).mean(), (y, stats)

  def step(params, stats, index, x):
    return jax.value_and_grad(loss, has_aux=True)(params, stats, index, x)

  indices = (
    jnp.int32(1),
    jnp.asarray([BITS.index(b) for b in ASSIGNMENT], jnp.int32),
  )
  reference = jax.jit(step)
  expected = [
    reference(split.params, split.batch_stats, index, x) for index in indices
  ]
  mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
  with jax.set_mesh(mesh):
    everywhere = NamedSharding(mesh, P())
    params, stats = jax.device_put(
      (split.params, split.batch_stats), everywhere
    )
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    sharded = jax.jit(step)
    for index, wanted in zip(indices, expected, strict=True):
      index = jax.device_put(index, everywhere)
      got = sharded(params, stats, index, x)
      assert len(got[0][1][0].sharding.device_set) == 4
      # Sums over the batch in another order.
      jax.tree.map(lambda a, b: close(a, b, 1e-4), got, wanted)


def test_a_sharded_batch_with_constant_bits_under_an_explicit_mesh(model):
  split = nn.functional(model)
  x = images(8, seed=1)

  def step(params, stats, x):
    return split.apply(params, stats, 2, x, train=True)

  expected = jax.jit(step)(split.params, split.batch_stats, x)
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    params, stats = jax.device_put(
      (split.params, split.batch_stats), NamedSharding(mesh, P())
    )
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    got = jax.jit(step)(params, stats, x)
  jax.tree.map(lambda a, b: close(a, b, 1e-4), got, expected)
