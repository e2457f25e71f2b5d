"""Prints what an artifact holds: layers, sizes by bit-width, checksums.

python -m dr_jax.inspect runs/digits/export/model [--bits=4]

Everything is read and verified; with --bits, what these need of it. The table
lists the quantized layers: kernels with their output channels last, and bytes
at the bits given, else at the highest. Of each bit-width follow the bytes of a
copy that serves it alone, the bytes that are read to serve it (lower ones read
less where codes nest), and the bytes of the quantized weights in it.

Exit codes:
    0: printed, and nothing that was read is damaged
    1: an error that nobody expected, with its traceback
    2: bad input: no artifact, or a damaged one, of which the piece is named
  130: stopped by Ctrl-C
  141: whoever read standard output closed it
"""

from __future__ import annotations

from dr_jax.runtime import command

# The imports below take seconds.
if __name__ == "__main__":
  command.stop_on_interrupt("nothing was verified")

from absl import flags

from dr_jax import allocate, deploy
from dr_jax.deploy.artifact import inspection

_BITS = flags.DEFINE_string(
  "bits",
  None,
  "A bit-width, or an allocation's file, as a run's "
  "export/allocations/*.json; by default everything is read.",
)


def start() -> None:
  """Runs the command with the arguments of this process, and ends it."""
  command.start(inspect, "ARTIFACT")


def inspect(path: str) -> int:
  """Prints what the artifact in a directory holds; returns the exit code."""
  given = _BITS.value
  bits = None if given is None else allocate.read_assignment(given)
  text = inspection.describe(deploy.open(path, bits))
  return command.show(lambda: print(text), path)


if __name__ == "__main__":
  start()
