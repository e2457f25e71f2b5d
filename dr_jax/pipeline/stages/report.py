"""Stage report: summary.json, and a figure of what searches found."""

from __future__ import annotations

from dr_jax import report
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.stage import Stage
from dr_jax.pipeline.summary import summarize
from dr_jax.runtime.files import write_json


def write_report(run: RunContext) -> None:
  """Writes summary.json and, after a search, report/pareto.png."""
  search = run.workdir.result("search")
  if search is not None:
    directory = run.workdir.path / STAGE.name
    directory.mkdir(exist_ok=True)
    report.plot_pareto(directory / "pareto.png", search["rows"])
  write_json(run.workdir.path / "summary.json", summarize(run))


STAGE = Stage(
  name="report",
  help="write summary.json and the figures",
  run=write_report,
  single_process=True,
  results=lambda run: (),
  is_done=lambda run: False,
)
