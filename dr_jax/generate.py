"""Continues a text with a language model, from its artifact alone.

python -m dr_jax.generate --artifact=runs/language/export/model --bits=4
    --prompt="Return the"

Bit-widths can change between bytes: --bits=8:32,4:100,2 makes the first 32
bytes at 8 bits, the next 100 at 4 and all others at 2. The prompt is read at
the first. Bit-planes that the highest does not need stay on disk.

Exit codes:
    0: done
    1: an error that nobody expected, with its traceback
    2: bad input, or files that cannot be read
  130: stopped by Ctrl-C
  141: whoever read standard output closed it
"""

from __future__ import annotations

from dr_jax.runtime import command

# The imports below take seconds.
if __name__ == "__main__":
  command.stop_on_interrupt("the text so far is all there is")

import codecs
import itertools
import math
import re
import sys
from collections.abc import Iterator

from absl import flags

from dr_jax import deploy
from dr_jax.runtime import compilation

_ARTIFACT = flags.DEFINE_string(
  "artifact", None, "Directory of the artifact, as a run's export/model."
)
_BITS = flags.DEFINE_string(
  "bits", None, "A bit-width, or several with numbers of bytes: 8:32,4:100,2."
)
_PROMPT = flags.DEFINE_string("prompt", None, "The text to continue.")
_BYTES = flags.DEFINE_integer(
  "bytes", 200, "Maximum number of new bytes.", lower_bound=1, upper_bound=10**9
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature",
  0.0,
  "Logits are divided by it before a byte is drawn; 0 takes the most likely.",
  lower_bound=0.0,
  upper_bound=1e6,
)
_TOP_K = flags.DEFINE_integer(
  "top_k", 0, "Draw from that many most likely bytes; 0 for all.", lower_bound=0
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the draws.", lower_bound=0, upper_bound=2**32 - 1
)
_CACHE = flags.DEFINE_enum(
  "cache",
  "float32",
  ["float32", "bfloat16", "int8"],
  "Type of the cached keys and values.",
)
_END = flags.DEFINE_bool(
  "end", True, "Stop at a zero byte, which ends a document."
)


def start() -> None:
  """Runs the command with the arguments of this process, and ends it."""
  command.start(_main)


def _main():
  compilation.cache_on_disk()
  text = _text()
  return command.show(lambda: _print(text), _ARTIFACT.value)


def _text() -> Iterator[int]:
  """Opens what the flags say; returns the bytes, the prompt first."""
  artifact, bits, prompt = command.required(_ARTIFACT, _BITS, _PROMPT)
  schedule = parse_bits(bits)
  if math.isnan(_TEMPERATURE.value):  # It is within any bounds.
    raise ValueError("--temperature must be a number >= 0, got nan")
  decoder = deploy.Decoder(
    artifact,
    bits=max(bits for bits, _ in schedule),
    cache_dtype=_CACHE.value,
  )
  for bits, _ in schedule:
    if bits not in decoder.candidates:
      raise ValueError(f"--bits must be of {decoder.candidates}, got {bits}")
  prompt = prompt.encode(errors="surrogateescape")
  made = decoder.stream(
    prompt,
    bits=itertools.islice(_unrolled(schedule), _BYTES.value),
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    seed=_SEED.value,
  )
  if _END.value:
    made = itertools.takewhile(bool, made)
  return itertools.chain(prompt, made)


def parse_bits(given: str) -> list[tuple[int, int | None]]:
  """Returns bit-widths and numbers of bytes, None for all that follow.

  Raises:
    ValueError: for anything else, or bytes behind the last bit-width.

  >>> parse_bits("8:32,4")
  [(8, 32), (4, None)]
  """
  parts = given.split(",")
  found = [re.fullmatch(r"(\d{1,2})(?::(\d{1,9}))?", part) for part in parts]
  if not all(found) or any(m and m[2] is None for m in found[:-1]):
    raise ValueError(
      "--bits must be a bit-width, or several, each but the last one with a "
      f"number of bytes, as 8:32,4:100,2, got {given!r}"
    )
  return [(int(m[1]), None if m[2] is None else int(m[2])) for m in found if m]


def _unrolled(schedule):
  """The bit-width of every byte; the last one's number is its end."""
  for bits, count in schedule:
    yield from itertools.repeat(bits, *(() if count is None else (count,)))


def _print(text):
  """Writes bytes as they come, as UTF-8."""
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  for byte in text:
    sys.stdout.write(decoder.decode(bytes([byte])))
    sys.stdout.flush()
  print(decoder.decode(b"", final=True))


if __name__ == "__main__":
  start()
