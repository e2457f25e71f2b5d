"""One network, many bit-widths: Double Rounding and its rivals in JAX and Flax.

    network = dr_jax.nn.quantize(
      float_network,
      weight=dr_jax.quant.double_rounding((8, 6, 4, 2)),
      sample=images,
    )
    dr_jax.nn.set_bits(network, 4)  # everywhere, or {layer: bits}
    logits = network(images)
    dr_jax.deploy.save("model", network)  # one integer file
    network = dr_jax.deploy.load("model", bits=2, model=float_network)

Subpackages are imported when they are first used: `quant` needs JAX and NumPy
alone, `nn` Flax too, and only a run loads data and checkpoint libraries.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from dr_jax import (
    allocate,
    checkpoint,
    config,
    data,
    deploy,
    hessian,
    interop,
    linen,
    models,
    nn,
    pipeline,
    quant,
    report,
    runtime,
    search,
    train,
  )

__all__ = [
  "allocate",
  "checkpoint",
  "config",
  "data",
  "deploy",
  "hessian",
  "interop",
  "linen",
  "models",
  "nn",
  "pipeline",
  "quant",
  "report",
  "runtime",
  "search",
  "train",
]


def __getattr__(name: str):
  if name in __all__:
    return importlib.import_module(f"dr_jax.{name}")
  if name == "__version__":
    return importlib.metadata.version("dr_jax")
  raise AttributeError(f"module 'dr_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*globals(), *__all__, "__version__"]
