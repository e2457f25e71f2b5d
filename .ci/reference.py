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
import warnings

import pdoc

import dr_jax


def main(folder: str) -> None:
  warnings.simplefilter("error", UserWarning)  # pdoc's
  for found in pkgutil.walk_packages(dr_jax.__path__, "dr_jax."):
    if "benchmarks" in found.name:  # Programs, whose flags have the same names.
      continue
    module = importlib.import_module(found.name)
    for _, kind in inspect.getmembers(module, inspect.isclass):
      if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        kind.__new__.__module__ = kind.__module__
  pdoc.render.configure(docformat="google")
  pdoc.pdoc("dr_jax", output_directory=pathlib.Path(folder))


if __name__ == "__main__":
  main(sys.argv[1] if len(sys.argv) > 1 else "reference")
