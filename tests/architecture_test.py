"""The layout of the package, checked from its source."""

import ast
import functools
import pathlib
import shutil
import subprocess
import sys

import pytest

import dr_jax

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "dr_jax").rglob("*.py"))

FLOORS = {
  name: floor
  for floor, names in enumerate(
    [
      "quant models runtime",
      "hessian allocate data nn checkpoint",
      "train deploy interop linen",
      "search",
      "config report",
      "pipeline",
      "main export generate inspect benchmarks",
    ],
    start=1,
  )
  for name in names.split()
}
COMMANDS = FLOORS["main"]
TOP_LEVEL = {
  *("pyproject.toml", "README.md", "LICENSE"),
  *("dr_jax", "configs", "launch", "tests", "colab", ".ci"),
}


def module(file):
  """Returns the dotted name of a file's module, as a list."""
  parts = list(file.relative_to(ROOT).with_suffix("").parts)
  return parts[:-1] if parts[-1] == "__init__" else parts


def owner(parts):
  """Returns the part of the package a module belongs to, "" for dr_jax."""
  return parts[1] if len(parts) > 1 else ""


def imported(file):
  """Yields the dotted names that a file imports, as lists."""
  for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      yield from (alias.name.split(".") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      package = module(file) + ["."] * (file.name == "__init__.py")
      base = package[: -node.level] if node.level else []
      base += node.module.split(".") if node.module else []
      yield from (base + [alias.name] for alias in node.names)


def offending(allowed, files=FILES):
  """Returns "file imports name" for every import that is not allowed."""
  return [
    f"{file.relative_to(ROOT)} imports {'.'.join(name)}"
    for file in files
    for name in imported(file)
    if not allowed(owner(module(file)), name)
  ]


def test_every_part_of_the_package_has_a_floor():
  assert {owner(module(file)) for file in FILES} - {""} <= set(FLOORS)


def test_every_part_but_the_commands_is_an_attribute_of_the_package():
  commands = {name for name, floor in FLOORS.items() if floor == COMMANDS}
  assert set(dr_jax.__all__) == set(FLOORS) - commands


def test_a_file_imports_from_its_own_part_and_from_lower_floors_only():
  def allowed(part, name):
    if name[0] != "dr_jax" or part in ("", owner(name)):
      return True
    return FLOORS.get(owner(name), 9) < FLOORS.get(part, 0)

  assert not offending(allowed)


@pytest.mark.parametrize(
  ("folder", "lower"),
  [("artifact", {"artifact"}), ("export", {"artifact", "export"})],
)
def test_folders_of_deploy_do_not_import_its_serving_files(folder, lower):
  def allowed(part, name):
    return name[:2] != ["dr_jax", "deploy"] or name[2] in lower

  files = (ROOT / "dr_jax/deploy" / folder).rglob("*.py")
  assert not offending(allowed, files)


def test_models_import_nothing_from_the_rest_of_the_package():
  assert not offending(
    lambda part, name: (
      part != "models" or name[0] != "dr_jax" or owner(name) == "models"
    )
  )


def test_quant_imports_jax_numpy_and_the_standard_library_only():
  # jaxtyping is for type checkers only: the last test sees it is not loaded.
  known = {"dr_jax", "jax", "numpy", "jaxtyping", *sys.stdlib_module_names}
  assert not offending(lambda part, name: part != "quant" or name[0] in known)


def test_only_the_checkpoint_file_imports_orbax():
  assert not offending(
    lambda part, name: part == "checkpoint" or name[0] != "orbax"
  )


@pytest.mark.parametrize(
  ("source", "names"),
  [
    ("import jax.numpy as jnp, numpy", ["jax.numpy", "numpy"]),
    ("from dr_jax import nn, quant", ["dr_jax.nn", "dr_jax.quant"]),
    ("from . import grid", ["dr_jax.quant.grid"]),
    ("from ..nn import bits", ["dr_jax.nn.bits"]),
    ("def f():\n  from orbax import checkpoint", ["orbax.checkpoint"]),
  ],
)
@pytest.mark.parametrize("name", ["lsq.py", "__init__.py"])
def test_imports_are_found_however_they_are_written(
  tmp_path, monkeypatch, source, names, name
):
  monkeypatch.setitem(globals(), "ROOT", tmp_path)
  file = tmp_path / "dr_jax" / "quant" / name
  file.parent.mkdir(parents=True)
  file.write_text(source)
  assert [".".join(parts) for parts in imported(file)] == names


def test_the_top_level_of_the_repository_holds_nothing_else():
  if shutil.which("git") is None or not (ROOT / ".git").exists():
    pytest.skip("no git repository")
  tracked = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
  ).stdout.splitlines()
  top = {path.split("/")[0] for path in tracked}
  assert {name for name in top - TOP_LEVEL if name[0] != "."} == set()


# What no subpackage for arrays and networks may load.
HEAVY = {
  *("absl", "grain", "matplotlib", "ml_collections", "orbax", "PIL", "rich"),
  *("sklearn", "tensorflow", "tensorflow_datasets", "jaxtyping"),
}


@functools.cache
def loaded_by(code):
  """Returns the modules that a fresh interpreter has after running code."""
  program = f"{code}\nimport sys; print(*sys.modules)"
  output = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  return set(output.split())


@pytest.mark.parametrize(
  ("name", "also"),
  [
    ("quant", {"flax", "optax", "scipy"}),
    ("allocate", {"flax", "optax"}),
    ("hessian", {"flax", "optax"}),
    ("nn", {"optax"}),
    ("models", {"optax"}),
    ("deploy", {"optax"}),
    ("interop.torch", {"optax", "qwix", "torch"}),
  ],
)
def test_a_subpackage_loads_only_what_it_needs(name, also):
  loaded = loaded_by(f"import dr_jax.{name}")
  assert "numpy" in loaded
  # Flax itself loads optax, Orbax and their helpers.
  if "flax" in loaded:
    flax = loaded_by("from flax import nnx")
    loaded = loaded - flax
  assert not (HEAVY | also) & loaded


def test_subpackages_are_attributes_without_being_imported_before():
  loaded = loaded_by("import dr_jax")
  assert "jax" not in loaded and "dr_jax.quant" not in loaded
  loaded_by("import dr_jax; assert dr_jax.quant.get('lsq').name == 'lsq'")
  loaded_by("import dr_jax; assert dr_jax.__version__ and dir(dr_jax)")
