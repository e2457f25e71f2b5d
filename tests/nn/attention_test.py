"""Quantized products of attention, against formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dr_jax import models, nn, quant, train
from dr_jax.nn.attention import Attention
from dr_jax.nn.products import operands_of

BITS = (8, 4, 2)
OPERANDS = ("query", "key", "weights", "value")


def random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


class Network(nnx.Module):
  """Attention between two layers."""

  def __init__(self, **options):
    rngs = nnx.Rngs(0)
    options = {"num_heads": 2, "decode": False} | options
    self.first = nnx.Linear(6, 8, rngs=rngs)
    self.attend = nnx.MultiHeadAttention(
      in_features=8, qkv_features=16, rngs=rngs, **options
    )
    self.last = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x, **options):
    return self.last(self.attend(self.first(x), **options))


def quantize(model, x, **options):
  options = {
    "weight": quant.double_rounding(BITS),
    "activation": quant.lsq_activation(BITS),
    "products": quant.lsq_activation(BITS),
    "skip": (),
  } | options
  network = nn.quantize(model, sample=x, **options)
  network.eval()
  return network


X = random(3, 5, 6)


@pytest.fixture(scope="module")
def network():
  return quantize(Network(), X, init="mse")


@pytest.fixture
def attention(network):
  """Its attention, with scales that clip some values at every bit-width."""
  attention = nnx.clone(network).attend.attention_fn
  for name, scale in zip(OPERANDS, (0.02, 0.015, 0.003, 0.01), strict=True):
    scales = [scale, 14 * scale, 70 * scale]
    getattr(attention, name).input_params["scale"][...] = jnp.array(scales)
  return attention


def arrays(groups=2):
  """Queries of 5 positions, keys and values of 7."""
  return (
    random(2, 5, 2, 4),
    random(2, 7, groups, 4, seed=1),
    random(2, 7, groups, 4, seed=2),
  )


def at(attention, index):
  for name in OPERANDS:
    getattr(attention, name).bits.set_value(jnp.int32(index))
  return attention


def rounded(attention, name, x, index):
  """Values, codes and distance of values from codes in steps, by hand."""
  bits = BITS[index]
  low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  if name == "weights":
    low, high = 0, 2**bits - 1
  scale = float(getattr(attention, name).input_params["scale"][index])
  codes = np.clip(np.round(x / scale), low, high)
  inside = (x >= low * scale) & (x <= high * scale)
  slope = np.where(inside, codes - x / scale, codes) / np.sqrt(x.size * high)
  return codes * scale, inside, slope


def forward(attention, query, key, value, mask, index):
  """The formula in float64: outputs, and what its gradient needs."""
  x = {"query": query, "key": key, "value": value}
  x = {name: np.asarray(a, np.float64) for name, a in x.items()}
  found = {n: rounded(attention, n, a, index) for n, a in x.items()}
  scores = np.einsum("nthd,nshd->nhts", found["query"][0], found["key"][0])
  scores = np.where(mask, scores / np.sqrt(query.shape[-1]), -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  x["weights"] = weights / weights.sum(-1, keepdims=True)
  found["weights"] = rounded(attention, "weights", x["weights"], index)
  y = np.einsum("nhts,nshd->nthd", found["weights"][0], found["value"][0])
  return y, x, found


MASK = np.tri(5, 7, 2, dtype=bool)[None, None]


@pytest.mark.parametrize("index", range(len(BITS)))
def test_outputs_are_those_of_the_formula(attention, index):
  query, key, value = arrays()
  at(attention, index)
  y = attention(query, key, value, mask=jnp.asarray(MASK))
  expected, x, found = forward(attention, query, key, value, MASK, index)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  for name in OPERANDS:  # Each side is clipped, and each is rounded.
    assert 0 < found[name][1].mean() <= 1
    assert np.abs(found[name][0] - x[name]).max() > 1e-4
  assert not all(found[name][1].all() for name in OPERANDS)


@pytest.mark.parametrize("index", [0, 1])
def test_gradients_are_straight_through(attention, index):
  query, key, value = arrays()
  at(attention, index)
  graph, params, rest = nnx.split(attention, nnx.Param, ...)
  g = random(2, 5, 2, 4, seed=3)

  def loss(params, *arrays):
    attend = nnx.merge(graph, params, rest)
    return (attend(*arrays, mask=jnp.asarray(MASK)) * g).sum()

  got = jax.grad(loss, (0, 1, 2, 3))(params, query, key, value)
  _, x, found = forward(attention, query, key, value, MASK, index)
  hat = {name: values for name, (values, *_) in found.items()}
  d = {
    "weights": np.einsum("nthd,nshd->nhts", g, hat["value"]),
    "value": np.einsum("nhts,nthd->nshd", hat["weights"], g),
  }
  dw = d["weights"] * found["weights"][1]
  w = x["weights"]
  scores = w * (dw - (dw * w).sum(-1, keepdims=True)) / np.sqrt(4)
  d["query"] = np.einsum("nhts,nshd->nthd", scores, hat["key"])
  d["key"] = np.einsum("nhts,nthd->nshd", scores, hat["query"])
  for name, gradient in zip(("query", "key", "value"), got[1:], strict=True):
    np.testing.assert_allclose(
      gradient, d[name] * found[name][1], rtol=1e-4, atol=1e-6
    )
  for name in OPERANDS:
    scale = got[0][name]["input_params"]["scale"][...]
    expected = np.zeros(3)
    expected[index] = (d[name] * found[name][2]).sum()
    assert expected[index] != 0
    np.testing.assert_allclose(scale, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", ["no", "mask", "bias", "causal", "both"])
def test_float_operands_give_what_flax_computes(groups, masked):
  query, key, value = arrays(groups)
  options = {
    "no": {},
    "mask": {"mask": jnp.asarray(MASK, jnp.float32)},
    "bias": {"bias": random(1, 2, 1, 7, seed=5)},
    "causal": {"is_causal": True},
    "both": {"is_causal": True, "mask": random(2, 2, 5, 7, seed=6) > -1},
  }[masked]
  np.testing.assert_allclose(
    Attention()(query, key, value, **options),
    nnx.dot_product_attention(query, key, value, **options),
    rtol=1e-5,
    atol=1e-6,
  )


def test_outputs_have_the_dtype_that_is_asked_for(attention):
  query, key, value = arrays()
  y = attention(query, key, value, dtype=jnp.bfloat16)
  assert y.dtype == jnp.bfloat16
  exact = attention(query, key, value)
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05)


def test_grouped_heads_are_full_ones_with_repeated_keys_and_values(attention):
  query, key, value = arrays(groups=1)
  y = attention(query, key, value)
  repeated = attention(query, *(jnp.repeat(a, 2, -2) for a in (key, value)))
  np.testing.assert_allclose(y, repeated, rtol=1e-6, atol=1e-6)
  with pytest.raises(ValueError, match="heads of queries must be a multiple"):
    attention(query, *(jnp.repeat(a, 3, -2) for a in (key, value)))


class Sown:
  """Keeps what is sown into it."""

  def sow(self, kind, name, value):
    assert kind is nnx.Intermediate
    setattr(self, name, value)


def test_dropout_acts_on_quantized_weights_in_training_alone(attention):
  query, key, value = arrays()
  holder = Sown()
  options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(4)}
  served = attention(
    query, key, value, deterministic=True, module=holder, **options
  )
  np.testing.assert_array_equal(served, attention(query, key, value))
  weights = holder.attention_weights
  scale = attention.weights.input_params["scale"][0]
  codes = weights / scale
  np.testing.assert_allclose(codes, jnp.round(codes), atol=1e-4)
  v_hat = rounded(attention, "value", np.asarray(value, np.float64), 0)[0]
  for shared, shape in ((True, (1, 1, 5, 7)), (False, (2, 2, 5, 7))):
    kept = jax.random.bernoulli(options["dropout_rng"], 0.5, shape)
    y = attention(query, key, value, broadcast_dropout=shared, **options)
    kept = np.asarray(weights) * np.asarray(kept) * 2
    expected = np.einsum("nhts,nshd->nthd", kept, v_hat)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_scales_start_from_what_calibration_sees_of_each_operand():
  model = Network()
  network = quantize(model, X, init="max", batches=[3 * X])
  seen = {name: 0.0 for name in OPERANDS}
  for x in (X, 3 * X):
    h = model.first(x)
    found = {n: getattr(model.attend, n)(h) for n in ("query", "key", "value")}
    scores = jnp.einsum("nthd,nshd->nhts", found["query"], found["key"])
    found["weights"] = nnx.softmax(scores / np.sqrt(8))
    for name, array in found.items():
      seen[name] = max(seen[name], float(jnp.abs(array).max()))
  for name, operand in operands_of(network):
    own = name.split("/")[-1]
    assert operand.input_quantizer.signed == (own != "weights")
    lowest = operand.input_params["scale"][0]
    codes = 255 if own == "weights" else 127
    # A range may end one code lower where its other end is negative.
    assert 0.98 < lowest * codes / seen[own] < 1.01


def test_a_softmax_has_unsigned_codes_whatever_the_others_have():
  products = quant.lsq_activation(BITS, signed=True)
  network = quantize(Network(), X, products=products)
  signs = [o.input_quantizer.signed for _, o in operands_of(network)]
  assert sorted(signs) == [False, True, True, True]


def test_bits_are_those_of_the_layer_whose_output_an_operand_is(network):
  names = [row.name for row in nn.layer_table(network)]
  bits = dict.fromkeys(names, 8)
  bits |= {"attend/key": 4, "attend/value": 2}
  nn.set_bits(network, bits)
  attention = network.attend.attention_fn
  index = {n: int(getattr(attention, n).bits[...]) for n in OPERANDS}
  assert index == {"query": 0, "key": 1, "weights": 2, "value": 2}
  split = nn.functional(network)
  labels = jax.tree.leaves(split.param_labels)
  assert labels.count("scale") == len(split.scale_layers) == 16
  # The first leaves, in alphabetical order.
  assert sorted(split.params) == ["attend", "first", "last"]
  assert sorted(split.params["attend"])[0] == "attention_fn"
  followed = dict(zip(sorted(OPERANDS), split.scale_layers, strict=False))
  assert {n: names[number] for n, number in followed.items()} == {
    "query": "attend/query",
    "key": "attend/key",
    "weights": "attend/value",
    "value": "attend/value",
  }


def test_bits_switch_without_compiling_again(network, compiled):
  split = nn.functional(network)

  @jax.jit
  def products_at(index):
    return split.apply(split.params, split.batch_stats, index, X)[0]

  outputs = [products_at(jnp.int32(i)) for i in range(len(BITS))]
  assert compiled["products_at"] <= 1
  for bits, y in zip(BITS, outputs, strict=True):
    nn.set_bits(network, bits)
    np.testing.assert_allclose(network(X), y, rtol=1e-4, atol=1e-4)
  errors = [float(jnp.abs(y - Network()(X)).max()) for y in outputs]
  assert errors[0] < 0.05 < errors[1] < errors[2]


def test_a_mixture_of_bits_mixes_operands(attention):
  query, key, value = arrays()
  weights = jnp.array([0.25, 0.75, 0.0])
  attention.query.bits.set_value(weights)
  expected = 0.25 * rounded(attention, "query", np.asarray(query), 0)[0]
  expected += 0.75 * rounded(attention, "query", np.asarray(query), 1)[0]
  np.testing.assert_allclose(attention.query(query), expected, rtol=1e-5)


def test_a_cache_gives_the_outputs_of_the_whole_sequence(network):
  nn.set_bits(network, 8)
  attend = nnx.clone(network).attend
  x = random(2, 5, 8, seed=7)
  whole = attend(x, is_causal=True)
  attend.init_cache(x.shape)
  steps = [attend(x[:, i : i + 1], decode=True) for i in range(5)]
  np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, atol=1e-3)


class Pooled(Network):
  """Logits of sequences."""

  def __call__(self, x):
    return super().__call__(x).mean(1)


@pytest.mark.slow
def test_scales_of_products_learn_in_joint_training():
  x, labels = random(24, 5, 6), jnp.arange(24, dtype=jnp.int32) % 3
  split = nn.functional(quantize(Pooled(), x))
  trainer = train.make_trainer(
    split,
    train.make_optimizer("adam", param_labels=split.param_labels),
    optax.constant_schedule(0.01),
    alrs="relative",
  )
  state = trainer.init(jax.random.key(0))
  batch = {"image": x, "label": labels}
  state, first = trainer.step(state, batch)
  for _ in range(40):
    state, losses = trainer.step(state, batch)
  assert (losses[:2] < first[:2] / 2).all()  # labels are arbitrary
  before = split.params["attend"]["attention_fn"]
  after = state.params["attend"]["attention_fn"]
  changed = jax.tree.map(lambda a, b: bool((a != b).all()), before, after)
  assert all(jax.tree.leaves(changed)) and len(jax.tree.leaves(changed)) == 4


@nnx.jit
def call(model, x):
  return model(x)


@pytest.mark.slow
def test_models_of_the_package_are_reached():
  options = {"depth": 1, "image_size": 8, "patch_size": 4, "width": 12}
  vit = models.build("vit", num_classes=4, rngs=nnx.Rngs(0), **options)
  transformer = models.build(
    "transformer",
    vocabulary=11,
    context=6,
    width=12,
    heads=2,
    kv_heads=1,
    depth=1,
    hidden=8,
    rngs=nnx.Rngs(0),
  )
  tokens = jnp.arange(6, dtype=jnp.int32)[None]
  for model, x in ((vit, random(2, 8, 8, 3)), (transformer, tokens)):
    network = quantize(model, x, init="mse")
    table = nn.coverage(model, network, x)
    products = [row for row in table if row.kind == "product"]
    assert [row.name.split("/")[-2:] for row in products] == [
      ["attention_fn", "scores"],
      ["attention_fn", "outputs"],
    ]
    assert table.macs == 1
    float_logits = call(model, x)
    error = jnp.abs(call(network, x) - float_logits).max()
    assert 0 < error < 0.05 * jnp.abs(float_logits).max()


def test_coverage_counts_products_whether_they_are_quantized_or_not(network):
  model = Network()
  layers = 5 * (6 * 8 + 4 * 8 * 16 + 8 * 3)
  each = 2 * 5 * 5 * 8  # heads, positions, positions, features
  partly = quantize(model, X, skip="*/scores")
  without = quantize(model, X, products=None)
  for found, reasons, quantized in (
    (network, ["", ""], 2),
    (partly, ["skipped", ""], 1),
    (without, ["products=None"] * 2, 0),
  ):
    table = nn.coverage(model, found, X)
    rows = [row for row in table if row.kind == "product"]
    assert [row.macs for row in rows] == [each, each]
    assert [row.parameters for row in rows] == [0, 0]
    assert [row.reason for row in rows] == reasons
    share = (layers + quantized * each) / (layers + 2 * each)
    assert table.macs == pytest.approx(share)
    assert table.parameters == 1
  assert without.attend.attention_fn is nnx.dot_product_attention


def own_attention(query, key, value, **options):
  return nnx.dot_product_attention(query, key, value, **options)


def test_products_out_of_reach_are_an_error_or_named():
  with pytest.raises(ValueError, match=r"but the model has none.*: \[\]$"):
    quantize(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), X)
  own = Network(attention_fn=own_attention)
  with pytest.raises(ValueError, match="functions: .'attend/attention_fn'.$"):
    quantize(own, X)
  with pytest.raises(ValueError, match="none that is not skipped"):
    quantize(Network(), X, skip="*/attention_fn/*")
  with pytest.raises(ValueError, match="products must be a quant.Activation.*"):
    quantize(Network(), X, products=quant.lsq(BITS))
  with pytest.raises(ValueError, match=r"products.bits must be .*got \(8, 2\)"):
    quantize(Network(), X, products=quant.lsq_activation((8, 2)))
  table = nn.coverage(own, quantize(own, X, products=None), X)
  assert ("attend/attention_fn", None, "is another function") in [
    (row.name, row.macs, row.reason) for row in table
  ]

  class Both(nnx.Module):
    def __init__(self):
      self.known, self.own = Network(), own

    def __call__(self, x):
      return self.known(x) + self.own(x)

  with pytest.warns(UserWarning, match="stay float: own/attend/attention_fn;"):
    quantize(Both(), X)


def test_skipped_attention_keeps_its_function():
  class Two(nnx.Module):
    def __init__(self):
      self.a, self.b = Network(), Network()

    def __call__(self, x):
      return self.a(x) + self.b(x)

  network = quantize(Two(), X, skip="a/attend/*")
  assert network.a.attend.attention_fn is nnx.dot_product_attention
  assert isinstance(network.b.attend.attention_fn, Attention)
