"""The examples in docstrings, run as doctests."""

import doctest
import importlib
import pathlib

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(
  ".".join(file.relative_to(ROOT).with_suffix("").parts)
  for file in (ROOT / "dr_jax").rglob("*.py")
  if ">>> " in file.read_text(encoding="utf-8") and file.name != "__init__.py"
)
PACKAGES = sorted(
  ".".join(file.parent.relative_to(ROOT).parts)
  for file in (ROOT / "dr_jax").rglob("__init__.py")
  if ">>> " in file.read_text(encoding="utf-8")
)

# What modules need that is no dependency of the package.
OPTIONAL = {"dr_jax.interop.qwix": "qwix"}


@pytest.mark.parametrize("name", [*MODULES, *PACKAGES])
def test_examples_in_docstrings_print_what_they_say(name):
  if name in OPTIONAL:
    pytest.importorskip(OPTIONAL[name], reason=f"needs {OPTIONAL[name]}")
  module = importlib.import_module(name)
  # An example is a user's session, without the strict promotion of tests.
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    failed, attempted = doctest.testmod(
      module,
      optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
  assert attempted and not failed
