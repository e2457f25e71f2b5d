"""The pages: which charts and tables each has, in which order."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from dr_jax.report import (
  comparison_charts,
  network_charts,
  search_charts,
  training_charts,
)
from dr_jax.report.chart import bits_name
from dr_jax.report.comparison import (
  Results,
  comparison_table,
  plot_comparison,
)
from dr_jax.report.figure import plot_lines
from dr_jax.report.page import render_page
from dr_jax.report.runs import (
  Run,
  is_comparison,
  read_comparison,
  read_run,
)
from dr_jax.report.searches import plot_searches, search_table
from dr_jax.report.summary import summary_table
from dr_jax.runtime import files
from dr_jax.runtime.tasks import TASKS

# Of a run or a comparison, in its directory.
PAGE = os.path.join("report", "index.html")


def page_of(directory: str | os.PathLike) -> str:
  """Returns the page of a run or a comparison, of what its directory holds.

  Raises:
    ValueError: if it holds neither, or a file is damaged.
    OSError: if a file cannot be read.
    ImportError: if plotly is not installed, saying how to install it.
  """
  text, _ = _read(directory)
  return text


def write_page(directory: str | os.PathLike) -> None:
  """Writes the page of a directory into it, and figures as PNG and SVG.

  Raises:
    As `page_of`; ImportError also without matplotlib.
  """
  page = files.expand(directory) / PAGE
  text, plots = _read(directory)
  files.write_text(page, text)
  for name, plot in plots.items():
    for suffix in ("png", "svg"):
      plot(page.with_name(f"{name}.{suffix}"))


def _read(directory) -> tuple[str, dict[str, Callable[..., None]]]:
  """The page of a directory, and what plots its figures, by name."""
  if is_comparison(directory):
    results = read_comparison(directory)
    name = files.expand(directory).resolve().name
    plot = functools.partial(plot_comparison, results=results)
    return comparison_page(name, results), {"compare": plot}
  run = read_run(directory)
  plots: dict[str, Callable[..., None]] = {}
  if (chart := training_charts.accuracy(run)) is not None:
    plots["accuracy"] = lambda path: plot_lines(path, chart)
  if rows := run.stages.get("search", {}).get("rows"):
    plots["pareto"] = lambda path: plot_searches(path, rows, run.task)
  return run_page(run), plots


def run_page(run: Run) -> str:
  """Returns the page of a run as HTML.

  Charts without data are left out.

  Raises:
    ImportError: if plotly is not installed, saying how to install it.
  """
  results = summary_table(run._asdict())
  results.title = "Results"
  rows = run.stages.get("search", {}).get("rows")
  return render_page(
    run.name,
    [
      results,
      training_charts.accuracy(run),
      *training_charts.learning_curves(run),
      *training_charts.scale_gradients(run),
      network_charts.scale_gradients(run),
      network_charts.weights(run),
      search_charts.traces(run),
      *search_charts.pareto(run),
      search_table(rows, run.task, title="Searches") if rows else None,
      training_charts.sizes(run),
      training_charts.seconds(run),
      _environment(run.environment),
      ("Configuration", run.config),
    ],
  )


def comparison_page(name: str, results: Results) -> str:
  """Returns the page of a comparison of methods as HTML.

  Raises:
    As `run_page`.
  """
  return render_page(
    name,
    [
      comparison_charts.methods(results),
      comparison_table(results),
      comparison_charts.training_seconds(results),
      _environment(results["environment"]),
    ],
  )


def runs_page(runs: Mapping[str, Run]) -> str:
  """Returns a page that compares runs, by name, as HTML.

  Raises:
    ValueError: if they are not of the same task, and so have no common metric.
    ImportError: as `run_page`.
  """
  tasks = {run.task for run in runs.values()}
  if len(tasks) > 1:
    raise ValueError(
      f"runs must be of the same task, got {' and '.join(sorted(tasks))}"
    )
  named = list(runs.items())
  return render_page(
    "Runs compared",
    [
      _runs_table(named),
      comparison_charts.runs_by_bits(named),
      comparison_charts.runs_by_bytes(named),
      *(_environment(run.environment, name) for name, run in named),
      *((f"Configuration of {name}", run.config) for name, run in named),
    ],
  )


def _runs_table(runs: Sequence[tuple[str, Run]]) -> Table:
  task = TASKS[runs[0][1].task]
  columns = list(
    dict.fromkeys(
      b for _, run in runs for b in comparison_charts.scores_of(run)
    )
  )
  table = Table(
    "run",
    *(bits_name(b) for b in columns),
    "bytes stored",
    "seconds",
    title=task.metric,
  )
  for name, run in runs:
    scores = comparison_charts.scores_of(run)
    size = run.stages.get("export", {}).get("stored_bytes")
    spent = training_charts.stage_seconds(run).values()
    table.add_row(
      name,
      *(task.shown(scores[b]) if b in scores else "" for b in columns),
      f"{size:,}" if size else "",
      f"{sum(filter(None, spent)):,.1f}",
    )
  return table


def _environment(environment: Mapping[str, str], name: str = "") -> Table:
  table = Table("", "", title=f"Environment {name}".strip())
  for key, value in environment.items():
    table.add_row(key, value)
  return table
