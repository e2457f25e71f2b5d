"""Networks and weights from and to other libraries.

`torch` reads the state dicts of PyTorch networks, without PyTorch. `qwix`
exchanges integer weights and rules with qwix; it needs that library (the extra
"qwix"), and is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from dr_jax.interop import qwix, torch

__all__ = ["qwix", "torch"]


def __getattr__(name: str):
  if name in __all__:
    return importlib.import_module(f"dr_jax.interop.{name}")
  raise AttributeError(f"module 'dr_jax.interop' has no attribute {name!r}")
