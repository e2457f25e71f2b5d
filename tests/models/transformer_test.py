"""The language model: each part against a formula, the cache against the whole.

Strings of 12 tokens, of which a cache holds 8 or all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import models, nn, quant
from dr_jax.models import transformer

SIZES = {"vocabulary": 19, "width": 16, "depth": 2, "heads": 4, "kv_heads": 2}
LENGTH = 12


def build(**options):
  options = {**SIZES, "context": LENGTH, **options}
  return models.build("transformer", rngs=nnx.Rngs(0), **options)


def parameters(**options):
  model = nnx.eval_shape(
    lambda: models.build("transformer", rngs=nnx.Rngs(0), **options)
  )
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.fixture(scope="module")
def model():
  return build()


@pytest.fixture(scope="module")
def tokens():
  drawn = np.random.default_rng(0).integers(0, 19, (2, LENGTH))
  return jnp.asarray(drawn, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def apply(graph, state, tokens, cache=None):
  return nnx.merge(graph, state)(tokens, cache=cache)


def decode(model, tokens, cache, first):
  """Logits of all tokens: `first` in one call, then one by one."""
  graph, state = nnx.split(model)
  calls, found = jnp.split(tokens, list(range(first, LENGTH)), 1), []
  for call in calls:
    logits, cache = apply(graph, state, call, cache)
    found.append(logits)
  return jnp.concatenate(found, 1)


def test_parameters_are_those_counted_by_hand():
  width, hidden, vocabulary = 128, 352, 256
  attention = 2 * width * width + 2 * width * width // 2
  block = attention + 3 * width * hidden + 2 * width
  assert parameters() == 4 * block + 2 * vocabulary * width + width
  assert parameters(hidden=64) == parameters() - 4 * 3 * width * (352 - 64)


def test_logits_are_float32_and_one_row_per_token(tokens):
  # Flax's norms take the mean square in float32.
  with jax.numpy_dtype_promotion("standard"):
    logits = nnx.eval_shape(lambda x: build(dtype="bfloat16")(x), tokens)
  assert logits.shape == (2, LENGTH, 19) and logits.dtype == jnp.float32


@pytest.mark.parametrize("changed", [0, 5, LENGTH - 1])
def test_a_token_changes_no_logits_before_it_and_its_own(
  model, tokens, changed
):
  graph, state = nnx.split(model)
  other = tokens.at[:, changed].set((tokens[:, changed] + 1) % 19)
  before, after = apply(graph, state, tokens), apply(graph, state, other)
  np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
  assert (before[:, changed:] != after[:, changed:]).any((0, 2)).all()


def test_a_rotation_is_a_product_of_complex_numbers():
  x = np.random.default_rng(1).normal(size=(2, 5, 3, 8)).astype(np.float32)
  positions = np.array([0, 1, 2, 7, 1000], np.int32)
  rates = np.float64(10_000) ** (-2 * np.arange(4) / 8)
  turns = np.exp(1j * positions[:, None] * rates)[None, :, None]
  turned = (x[..., :4] + 1j * x[..., 4:]) * turns
  expected = np.concatenate([turned.real, turned.imag], -1)
  found = transformer.rotate(jnp.asarray(x), jnp.asarray(positions))
  # An angle of 1000 has an error of 3e-5 in float32.
  np.testing.assert_allclose(found, expected, atol=2e-4)


def test_attention_scores_depend_on_distances_alone():
  x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 1, 6, 1, 8)))
  query, key = x.astype(jnp.float32)
  scores = [
    jnp.einsum(
      "ntkd,nskd->ts",
      transformer.rotate(query, positions),
      transformer.rotate(key, positions),
    )
    for positions in (jnp.arange(6), jnp.arange(6) + 40)
  ]
  np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_grouped_heads_are_full_ones_with_repeated_keys_and_values(tokens):
  grouped, full = build(), build(kv_heads=4)
  for name in ("embed", "norm", "head"):
    nnx.update(getattr(full, name), nnx.state(getattr(grouped, name)))
  for few, many in zip(grouped.blocks, full.blocks, strict=True):
    state = nnx.state(few)
    for name in ("key", "value"):
      kernel = state["attention"][name]["kernel"]
      heads = kernel[...].reshape(16, 2, 4)
      repeated = jnp.repeat(heads, 2, axis=1).reshape(16, 16)
      state["attention"][name]["kernel"] = kernel.replace(repeated)
    nnx.update(many, state)
  np.testing.assert_allclose(grouped(tokens), full(tokens), atol=1e-6)


@pytest.mark.parametrize("first", [1, 7, LENGTH])
def test_a_cache_gives_the_logits_of_the_whole_sequence(model, tokens, first):
  graph, state = nnx.split(model)
  found = decode(model, tokens, model.init_cache(2), first)
  # The same numbers, multiplied in another order.
  np.testing.assert_allclose(found, apply(graph, state, tokens), atol=1e-5)


def test_an_int8_cache_is_close_and_takes_a_quarter_and_its_scales(
  model, tokens
):
  cache = model.init_cache(2, dtype=jnp.int8)
  found = decode(model, tokens, cache, 7)
  graph, state = nnx.split(model)
  expected = apply(graph, state, tokens)
  # Half of 1/127 of the largest key or value of a head, each time.
  assert 0 < jnp.abs(found - expected).max() < 0.01 * jnp.abs(expected).max()
  # Of heads of 4 features each has 4 bytes, and a scale of 4.
  assert cache.nbytes == model.init_cache(2).nbytes * (1 / 4 + 1 / 4)


def test_int8_rows_are_within_half_a_code_of_what_was_written():
  rows = transformer.KeyValues(
    *(models.attention_cache.Rows.zeros((1, 4, 2, 8), jnp.int8),) * 2
  )
  x = np.random.default_rng(3).normal(size=(1, 2, 2, 8)).astype(np.float32)
  x[0, 1, 1] = 0
  positions = jnp.array([6, 7])  # slots 2 and 3
  rows = rows.write(positions, jnp.asarray(x), jnp.asarray(10 * x))
  key, value = rows.read(jnp.float32)
  for read, written in ((key, x), (value, 10 * x)):
    step = np.abs(written).max(-1, keepdims=True) / 127
    assert (np.abs(read[:, 2:] - written) <= step * 0.5001).all()
    assert not read[:, :2].any()


def test_a_full_cache_forgets_the_first_tokens(model, tokens):
  # Eight slots: the last token attends to itself and seven before it. With one
  # block, keys and values are of single tokens, and what is forgotten is as if
  # it had never been.
  small = build(depth=1, context=8)
  found = decode(small, tokens, small.init_cache(2), 8)
  recent = small(tokens[:, -8:])
  np.testing.assert_allclose(found[:, -1], recent[:, -1], atol=1e-5)


def test_more_tokens_than_the_context_are_an_error(model):
  with pytest.raises(ValueError, match="at most 12 in a row.* got 13"):
    model(jnp.zeros((1, 13), jnp.int32))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"heads": 3}, "heads must divide width=16 .* even number .*, got 3"),
    ({"heads": 16}, "heads must divide width=16 .* even number .*, got 16"),
    ({"kv_heads": 3}, "kv_heads must divide heads=4, got 3"),
    ({"context": 0}, r"context must be an integer in 1\.\..*, got 0"),
    ({"vocabulary": 1}, r"vocabulary must be an integer in 2\.\..*, got 1"),
    ({"depth": True}, r"depth must be an integer in 1\.\..*, got True"),
    ({"num_classes": 3}, "options of model 'transformer' must be .*vocabulary"),
  ],
)
def test_a_size_that_is_not_allowed_is_an_error_that_names_it(options, message):
  with pytest.raises(ValueError, match=message):
    build(**options)


def test_every_projection_is_quantized(model, tokens):
  quantized = nn.quantize(
    model,
    weight=quant.double_rounding((8, 2)),
    activation=quant.lsq_activation((8, 2)),
    sample=tokens,
    skip=("head",),
  )
  names = [row.name for row in nn.layer_table(quantized)]
  kinds = ("query", "key", "value", "out")
  for block in ("blocks/0", "blocks/1"):
    assert {f"{block}/attention/{kind}" for kind in kinds} < set(names)
    assert {f"{block}/gated/{kind}" for kind in ("gate", "up", "down")} < set(
      names
    )
  cached = decode(quantized, tokens, model.init_cache(2), 7)
  np.testing.assert_allclose(quantized(tokens), cached, atol=1e-2)
