"""Executes notebooks and writes them back: python .ci/notebooks.py [FILE...].

All of colab/ by default. What is written is what a reader sees: cells, and
their text and figures, without times, versions and settings of this machine.
"""

import os
import pathlib
import sys
import tempfile

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))

# Of outputs with several forms, those that every viewer shows.
_SHOWN = ("text/plain", "image/png")
_METADATA = {
  "kernelspec": {
    "display_name": "Python 3",
    "language": "python",
    "name": "python3",
  },
  "language_info": {"name": "python"},
}


def execute(
  notebook: nbformat.NotebookNode, folder: str, seconds: int = 600, **env: str
) -> None:
  """Runs all cells in a fresh kernel, in place.

  Args:
    notebook: its outputs are replaced.
    folder: where the kernel runs, and keeps its own files.
    seconds: after which a cell has failed.
    **env: variables that the kernel sees beside those of this process.

  Raises:
    nbclient.exceptions.CellExecutionError: if a cell raises.
  """
  private = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": f"{folder}/.ipython"}
  client = nbclient.NotebookClient(
    notebook,
    kernel_name="python3",
    timeout=seconds,
    record_timing=False,
    coalesce_streams=True,
    resources={"metadata": {"path": folder}},
  )
  client.execute(env=os.environ | private | env)


def strip(notebook: nbformat.NotebookNode) -> None:
  """Takes off what differs between machines and runs, in place."""
  notebook.metadata = nbformat.from_dict(_METADATA)
  for cell in notebook.cells:
    cell.metadata = nbformat.NotebookNode()
    for output in cell.get("outputs", ()):
      if "data" in output:
        output.metadata = nbformat.NotebookNode()
        for form in set(output.data) - set(_SHOWN):
          del output.data[form]


def main(files: list[pathlib.Path]) -> None:
  for file in files:
    print(file, flush=True)
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
      execute(notebook, folder)
    strip(notebook)
    nbformat.write(notebook, file)


if __name__ == "__main__":
  main([pathlib.Path(name) for name in sys.argv[1:]] or NOTEBOOKS)
