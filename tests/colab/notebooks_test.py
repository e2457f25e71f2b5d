"""The notebooks of colab/: well-formed as they are stored, and they run."""

import itertools
import pathlib
import re

import jax
import nbformat
import notebooks
import pytest

ROOT = pathlib.Path(__file__).parents[2]
ADDRESS = re.compile(r"github(?:\.com)?/([\w-]+/dr_jax)")


@pytest.fixture(params=notebooks.NOTEBOOKS, ids=lambda file: file.stem)
def file(request):
  return request.param


@pytest.fixture
def notebook(file):
  return nbformat.read(file, as_version=4)


def code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
  return list(itertools.chain(*(cell.outputs for cell in code(notebook))))


def test_it_follows_the_format_and_is_small(file, notebook):
  nbformat.validate(notebook)
  assert file.stat().st_size < 300_000


def test_every_cell_ran_in_order_and_shows_something(notebook):
  counts = [cell.execution_count for cell in code(notebook)]
  assert counts == list(range(1, len(counts) + 1))
  assert all(cell.outputs for cell in code(notebook))


def test_no_cell_ended_in_an_error_or_a_warning(notebook):
  for output in outputs(notebook):
    assert output.output_type != "error"
    assert output.get("name") != "stderr", output.text


def test_it_is_stored_without_what_belongs_to_a_machine(file, notebook):
  text = file.read_text(encoding="utf-8")
  assert not re.search(r"/(tmp|home|root|work|content|Users|var)/", text)
  stored = notebook.copy()
  notebooks.strip(notebook)
  assert notebook == stored


def test_the_first_code_cell_installs_the_library_as_in_all_notebooks():
  every = (nbformat.read(file, as_version=4) for file in notebooks.NOTEBOOKS)
  (first,) = {code(notebook)[0].source for notebook in every}
  assert 'find_spec("dr_jax")' in first and "%pip install" in first


def test_all_pages_have_the_same_address_of_the_repository():
  pages = [ROOT / "README.md", ROOT / "colab/README.md", *notebooks.NOTEBOOKS]
  found = [set(ADDRESS.findall(page.read_text())) for page in pages]
  assert all(len(addresses) == 1 for addresses in found)
  assert len(set.union(*found)) == 1


@pytest.mark.parametrize("page", ["README.md", "colab/README.md"])
def test_the_pages_have_a_badge_for_every_notebook(page):
  badges = re.findall(
    r"blob/main/colab/(\w+)\.ipynb", (ROOT / page).read_text()
  )
  assert sorted(badges) == [file.stem for file in notebooks.NOTEBOOKS]


@pytest.mark.slow
def test_it_runs_in_a_fresh_kernel(notebook, tmp_path, monkeypatch):
  # The kernel is a user's: one device, and threads as JAX has them.
  for name in ("XLA_FLAGS", "NPROC"):
    monkeypatch.delenv(name, raising=False)
  cache = jax.config.jax_compilation_cache_dir
  notebooks.execute(notebook, str(tmp_path), JAX_COMPILATION_CACHE_DIR=cache)
  assert all(cell.outputs for cell in code(notebook))
