"""Bytes on disk of one artifact, compared with float and with four models.

  python -m dr_jax.benchmarks.sizes [--model=resnet20,resnet18]
      [--rounding=half_up,floor] [--bits=8,6,4,2] [--all_layers]

Of each network: the float network as a safetensors file, the artifacts of each
bit-width alone (`separate`, their sum), the artifact of all (`ours`), and what
`deploy.open(path, bits=b)` reads of that, also in percent of float. Sizes do
not depend on what a network has learned: it is not trained here.
"""

from __future__ import annotations

from absl import flags

from dr_jax import quant
from dr_jax.benchmarks import network, on_disk
from dr_jax.pipeline.summary import environment
from dr_jax.quant.core.checks import one_of
from dr_jax.runtime import command

_MODELS = flags.DEFINE_list("model", ["resnet20"], "Networks.")
_ROUNDINGS = flags.DEFINE_list(
  "rounding", list(quant.ROUNDINGS), "Rules of the second rounding."
)
_BITS = flags.DEFINE_list("bits", ["8", "6", "4", "2"], "Bit-widths.")
_ALL = flags.DEFINE_bool(
  "all_layers", False, "Quantize the first and the last layer too."
)


def main():
  for name in _MODELS.value:
    one_of("model", name, network.NAMES)
  bits = network.bit_widths(_BITS.value)
  for name in _MODELS.value:
    setting = network.Setting(name, bits=bits)
    sizes = on_disk.measure(setting, _ROUNDINGS.value, all_layers=_ALL.value)
    on_disk.print_table(name, sizes)
  print(environment())


if __name__ == "__main__":
  command.start(main)
