"""Text from the artifact of a language model, byte by byte.

Bits are an array among the inputs of one compiled program, as in `Switchable`:
they can change before any byte, and nothing is compiled again. Keys and values
in the cache stay those of the bit-width at which their bytes were read.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dr_jax import models, nn
from dr_jax.deploy import artifact as artifacts

_BYTES = 256


class Decoder:
  """Continues texts with a language model that an artifact holds.

  Attributes:
    artifact: what was opened.
    candidates: bit-widths for which it was read, highest first.
    context: how many bytes the network sees.

  >>> import tempfile
  >>> from flax import nnx
  >>> from dr_jax import deploy, quant
  >>> options = {"context": 8, "width": 8, "depth": 1, "heads": 2}
  >>> model = models.build("transformer", rngs=nnx.Rngs(0), **options)
  >>> network = nn.quantize(
  ...   model,
  ...   weight=quant.double_rounding((8, 4)),
  ...   sample=jnp.zeros((1, 8), jnp.int32),
  ... )
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   architecture = ("transformer", options)
  ...   deploy.save(f"{folder}/model", network, architecture=architecture)
  ...   decoder = deploy.Decoder(f"{folder}/model")
  >>> text = decoder.stream(b"abc", bits=[8, 4, 4])
  >>> len(bytes(text))
  3
  """

  def __init__(
    self,
    artifact: str | os.PathLike | artifacts.Artifact,
    *,
    bits: int | None = None,
    cache_dtype: DTypeLike = jnp.float32,
  ):
    """Opens an artifact and builds its network.

    Args:
      artifact: a directory, or what `deploy.open` returned.
      bits: the highest bit-width that will be used; of codes that nest no more
        is read. The highest of the artifact by default.
      cache_dtype: of keys and values; int8 takes about a quarter of float32.

    Raises:
      ArtifactError: as `deploy.open`.
      ValueError: if it is not a language model of bytes.
    """
    if not isinstance(artifact, artifacts.Artifact):
      artifact = artifacts.open(artifact, bits)
    _check_architecture(artifact)
    network: Any = artifact.load()
    self.artifact = artifact
    self.candidates = tuple(filter(artifact.holds, artifact.bits))
    self.context: int = network.context
    self._empty = network.init_cache(dtype=cache_dtype)
    apply, params, state, *_ = nn.functional(network)
    self._arrays = params, state

    @functools.partial(jax.jit, donate_argnums=3)
    def read(arrays, index, tokens, cache):
      (logits, cache), _ = apply(*arrays, index, tokens, cache=cache)
      return logits[0, -1], cache

    self._read = read

  def stream(
    self,
    prompt: bytes,
    *,
    bits: Iterable[int],
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
  ) -> Iterator[int]:
    """Yields the bytes that follow a prompt, one for each entry of `bits`.

    Args:
      prompt: what to continue, at least one byte; of more than the context the
        last ones. It is read at the first bit-width.
      bits: the bit-width of each byte, at which it is read once it is there.
      temperature: logits are divided by it; 0 takes the most likely byte.
      top_k: bytes to choose from, the most likely ones; 0 for all.
      seed: of the draws; byte i depends on it, i and the logits alone.

    Raises:
      ValueError: if the prompt is empty, or a bit-width was not read.
    """
    if not prompt:
      raise ValueError("prompt must have at least one byte, got none")
    key = jax.random.key(seed)
    waiting, cache = (
      prompt[-self.context :],
      jax.tree.map(jnp.copy, self._empty),
    )
    for number, wanted in enumerate(bits):
      if wanted not in self.candidates:
        raise ValueError(f"bits must be one of {self.candidates}, got {wanted}")
      index = jnp.int32(self.artifact.bits.index(wanted))
      logits: Any = None
      for chunk in _chunks(waiting):
        tokens = jnp.asarray([list(chunk)], jnp.int32)
        logits, cache = self._read(self._arrays, index, tokens, cache)
      draw = jax.random.fold_in(key, number)
      byte = int(choose(logits, draw, temperature, top_k=top_k))
      yield byte
      waiting = bytes([byte])


@functools.partial(jax.jit, static_argnames="top_k")
def choose(
  logits: jax.Array,
  key: jax.Array,
  temperature: float | jax.Array,
  *,
  top_k: int = 0,
) -> jax.Array:
  """Draws a class, int32 [], from logits [classes].

  Args:
    logits: float32.
    key: PRNG key.
    temperature: logits are divided by it; 0 takes the largest one.
    top_k: classes to draw from, those of the largest logits; 0 for all.

  >>> logits = jnp.array([0.0, 3.0, 2.9, -1.0])
  >>> int(choose(logits, jax.random.key(0), 0.0))
  1
  """
  if 0 < top_k < len(logits):
    smallest = jax.lax.top_k(logits, top_k)[0][-1]
    logits = jnp.where(logits >= smallest, logits, -jnp.inf)
  divisor = jnp.where(temperature > 0, temperature, 1)
  drawn = jax.random.categorical(key, logits / divisor)
  return jnp.where(temperature > 0, drawn, logits.argmax())


def _check_architecture(artifact):
  named = artifact.manifest["architecture"]
  name, options = named or ("an unnamed network", {})
  if name not in models.TASKS["language"]:
    known = ", ".join(models.TASKS["language"])
    raise ValueError(
      f"artifact must be of a language model ({known}), got {name} in "
      f"{artifact.path}"
    )
  tokens = options.get("vocabulary", _BYTES)
  if tokens != _BYTES:
    raise ValueError(
      f"artifact must have {_BYTES} tokens, one for each byte, got {tokens} in "
      f"{artifact.path}"
    )


def _chunks(text: bytes) -> Iterator[bytes]:
  """Cuts a text in powers of two, so that few lengths are compiled.

  >>> [len(chunk) for chunk in _chunks(bytes(11))]
  [8, 2, 1]
  """
  while text:
    size = 1 << (len(text).bit_length() - 1)
    yield text[:size]
    text = text[size:]
