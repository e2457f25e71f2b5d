"""One file per method: importing this package registers all of them."""

import importlib
import pkgutil


def discover() -> None:
  """Imports every module of this package, and so registers its methods."""
  for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")


discover()
