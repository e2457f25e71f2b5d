"""Text from an artifact: bytes against a loop without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_language_model
from flax import nnx

from dr_jax import deploy, nn, quant
from dr_jax.deploy.decoder import choose

PROMPT = b"def f(x):"
COUNT = 5


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("decoder") / "model"
  small_language_model.save(path)
  return path


@pytest.fixture(scope="module")
def decoder(path):
  return deploy.Decoder(path)


def text(decoder, bits=(8,) * COUNT, prompt=PROMPT, **options):
  return bytes(decoder.stream(prompt, bits=bits, **options))


@pytest.mark.parametrize("bits", [8, 2])
def test_greedy_bytes_are_the_most_likely_without_a_cache(decoder, path, bits):
  found = text(decoder, (bits,) * COUNT)
  network = nn.functional(deploy.load(path))
  index = small_language_model.BITS.index(bits)
  tokens = jnp.asarray([list(PROMPT + found[:-1])], jnp.int32)
  arrays = network.params, network.batch_stats
  logits, _ = jax.jit(network.apply)(*arrays, index, tokens)
  assert bytes(logits[0, -COUNT:].argmax(-1).tolist()) == found


def test_bits_change_between_bytes_and_nothing_is_compiled_again(decoder):
  high, low = text(decoder), text(decoder, (2,) * COUNT)
  assert high != low
  compiled = decoder._read._cache_size()
  mixed = text(decoder, (8, 8, 2, 2, 4))
  assert mixed[:2] == high[:2]
  assert decoder._read._cache_size() == compiled


def test_draws_depend_on_the_seed_and_one_of_one_byte_is_greedy(decoder):
  drawn = [text(decoder, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
  assert drawn[0] == drawn[1] != drawn[2]
  assert text(decoder, temperature=2.0, top_k=1) == text(decoder)


def test_a_prompt_of_more_than_the_context_is_cut(decoder):
  long = b"anything before " + b"0123456789abcdef"
  assert decoder.context == 16
  assert text(decoder, prompt=long) == text(decoder, prompt=long[-16:])


def test_only_planes_of_the_highest_bit_width_are_read(decoder, path):
  low = deploy.Decoder(path, bits=2)
  sizes = [d.artifact.read_bytes for d in (low, decoder)]
  assert sizes[0] < sizes[1]
  assert text(low, (2,) * COUNT) == text(decoder, (2,) * COUNT)
  with pytest.raises(ValueError, match=r"bits must be one of \(2,\), got 8"):
    text(low)


def test_an_int8_cache_gives_the_first_byte_of_a_float_one(decoder, path):
  small = deploy.Decoder(path, cache_dtype=jnp.int8)
  assert text(small, (8,)) == text(decoder, (8,))


def test_drawn_classes_follow_the_softmax_of_the_largest():
  logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
  keys = jax.random.split(jax.random.key(0), 4000)
  drawn = jax.vmap(lambda key: choose(logits, key, 1.0, top_k=2))(keys)
  counts = np.bincount(drawn, minlength=4) / 4000
  # Standard error 0.008.
  np.testing.assert_allclose(counts, [0, 4 / 7, 0, 3 / 7], atol=0.03)
  sharp = jax.vmap(lambda key: choose(logits, key, 0.05))(keys)
  assert (np.asarray(sharp) == 1).mean() > 0.99


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"prompt": b""}, "prompt must have at least one byte, got none"),
    ({"bits": (8, 3)}, r"bits must be one of \(8, 4, 2\), got 3"),
  ],
)
def test_what_is_not_there_is_an_error(decoder, options, message):
  with pytest.raises(ValueError, match=message):
    text(decoder, **options)


def test_a_network_that_is_no_language_model_is_an_error(tmp_path):
  layer = nn.quantize(
    nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
    weight=quant.double_rounding((8,)),
    sample=jnp.ones((1, 2)),
    skip=(),
  )
  deploy.save(tmp_path / "model", layer)
  with pytest.raises(ValueError, match=r"\(transformer\), got an unnamed"):
    deploy.Decoder(tmp_path / "model")


def test_a_language_model_of_other_tokens_is_an_error(tmp_path):
  small_language_model.save(tmp_path / "model", vocabulary=32)
  with pytest.raises(ValueError, match="256 tokens, one for each byte, got 32"):
    deploy.Decoder(tmp_path / "model")
