"""Builds the API reference from the docstrings: python .ci/reference.py [DIR].

pdoc resolves the types of a constructor in the module of its function. That of
a NamedTuple says "namedtuple_<name>", and no such module exists: here it says
where the class is defined.
"""

import importlib
import inspect
import pathlib
import pkgutil
import sys
import types
import warnings
from collections.abc import Iterator

import pdoc

import dr_jax


def main(folder: str) -> None:
  warnings.simplefilter("error", UserWarning)  # pdoc's
  for module in documented():
    for _, kind in inspect.getmembers(module, inspect.isclass):
      if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        kind.__new__.__module__ = kind.__module__
  pdoc.render.configure(docformat="google")
  pdoc.pdoc("dr_jax", output_directory=pathlib.Path(folder))


def documented() -> Iterator[types.ModuleType]:
  """Yields all modules but commands, whose flags have the same names."""
  for name in dr_jax.__all__:
    part = importlib.import_module(f"dr_jax.{name}")
    yield part
    for found in pkgutil.walk_packages(part.__path__, f"{part.__name__}."):
      yield importlib.import_module(found.name)


if __name__ == "__main__":
  main(sys.argv[1] if len(sys.argv) > 1 else "reference")
