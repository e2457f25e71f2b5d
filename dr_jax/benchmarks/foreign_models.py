"""What `nn.quantize` and Qwix quantize of networks of public Flax NNX packages.

  pip install 'dr_jax[test-foreign]'
  python -m dr_jax.benchmarks.foreign_models [--networks=Llama3,DiT]

At 8 bits, without training. Ours: `double_rounding`, init="mse", no layer
skipped; inputs once by `lsq_activation`, one scale for all inputs of a layer
from the calibration batch, and once by `dynamic_activation`, a scale computed
from each row. Qwix's PTQ: int8 weights per output channel, int8 inputs with a
scale computed from each row, its default. The ratio is that of rows.

A share is one of multiply-accumulates: "layers" counts products with
parameters, "all" those and products of two inputs, as attention has. For Qwix,
any product with an 8-bit operand in its program counts. An asterisk: it stops
at an einsum of more than two operands, and einsums therefore stay float.
"fails": the model calls what Qwix's arrays do not have. The error is |quantized
- float| / |float| of the output, for a batch that calibration did not see.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from dr_jax import nn, quant
from dr_jax.benchmarks.foreign_networks import NETWORKS, Network
from dr_jax.benchmarks.products import products
from dr_jax.benchmarks.rows import Rows
from dr_jax.pipeline.summary import environment
from dr_jax.quant.core.checks import one_of
from dr_jax.runtime import command

_NETWORKS = flags.DEFINE_list("networks", list(NETWORKS), "Names of networks.")

BITS = (8, 4, 2)
_WITHOUT_EINSUM = ("dot_general", "conv_general_dilated")


class Measured(NamedTuple):
  """Of one way to quantize a network.

  Attributes:
    of_layers: share of the multiply-accumulates with parameters.
    of_all: share of all multiply-accumulates.
    error: of the output, with a scale for each row of inputs.
  """

  of_layers: float
  of_all: float
  error: float


def quantized(
  network: Network,
  model: nnx.Module,
  inputs: quant.ActivationQuantizer | None = None,
) -> nnx.Module:
  """The network at several bit-widths, all of its layers, before training.

  Its inputs have stored scales by default.
  """
  return nn.quantize(
    model,
    weight=quant.double_rounding(BITS),
    activation=inputs or quant.lsq_activation(BITS),
    sample=network.inputs(jax.random.key(0)),
    init="mse",
    skip=network.skip,
  )


def _ours(network):
  """What is measured; the error with stored scales; seconds to convert."""
  model, inputs = network.model(), network.inputs(jax.random.key(0))
  found = products(network.function(model), *inputs)
  start = time.perf_counter()
  stored = quantized(network, model)
  seconds = time.perf_counter() - start
  ours = quantized(network, model, quant.dynamic_activation(BITS))
  rows = nn.coverage(model, ours, inputs)
  examples = next(x.shape[0] for x in inputs if jnp.ndim(x))
  macs = examples * sum(row.macs or 0 for row in rows if not row.reason)
  measured = Measured(
    macs / _sum(found, layers=True), macs / _sum(found), _error(network, ours)
  )
  return measured, _error(network, stored), seconds


def _qwix(network, operations=()):
  qwix = importlib.import_module("qwix")
  rule = qwix.QuantizationRule(
    weight_qtype=jnp.int8, act_qtype=jnp.int8, op_names=operations
  )
  inputs = network.inputs(jax.random.key(0))
  provider = qwix.PtqProvider([rule])
  theirs = qwix.quantize_model(network.model(), provider, *inputs)
  found = products(network.function(theirs), *inputs)
  integers = [p for p in found if p.in_integers]
  return Measured(
    _sum(integers, layers=True) / _sum(found, layers=True),
    _sum(integers) / _sum(found),
    _error(network, theirs),
  )


def _sum(found, *, layers=False):
  return sum(p.macs for p in found if p.of_layer or not layers)


def _error(network, model):
  inputs = network.inputs(jax.random.key(1))
  expected = jax.jit(network.function(network.model()))(*inputs)
  error = jnp.linalg.norm(jax.jit(network.function(model))(*inputs) - expected)
  return float(error / jnp.linalg.norm(expected))


def row(name: str) -> list[str]:
  """The row of the table of one network."""
  network = NETWORKS[name]
  if importlib.util.find_spec(network.module.split(".")[0]) is None:
    return [name, network.package, "not installed"]
  ours, stored, seconds = _ours(network)
  theirs, mark = _theirs(network)
  both = ours, theirs
  return [
    *(name, network.package),
    *(f"{100 * m.of_layers:.0f}" if m else "fails" for m in both),
    *(f"{100 * m.of_all:.0f}" if m else "" for m in both),
    f"{100 * stored:.2f}",
    *(f"{100 * m.error:.2f}" if m else "" for m in both),
    f"{ours.error / theirs.error:.2f}{mark}" if theirs else "",
    f"{seconds:.1f}",
  ]


def _theirs(network):
  """What is measured of Qwix, None where it fails; a mark for the row."""
  try:
    return _qwix(network), ""
  except (ValueError, NotImplementedError):  # an einsum of three operands
    return _qwix(network, _WITHOUT_EINSUM), " *"
  except TypeError:
    return None, ""


def main():
  errors = "stored scale", "rows", "Qwix", "ratio"
  headers = ("layers", "Qwix", "all", "Qwix", *errors, "s")
  rows = Rows(
    "% of products, % of error", ("network", "package", *headers), left=2
  )
  for name in _NETWORKS.value:
    one_of("networks", name, list(NETWORKS))
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", DeprecationWarning)
      rows.add(*row(name))
  rows.end()
  print(environment())


if __name__ == "__main__":
  command.start(main)
