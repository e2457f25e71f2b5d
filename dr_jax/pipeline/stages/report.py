"""Stage report: summary.json, a page, and figures."""

from __future__ import annotations

from dr_jax import report
from dr_jax.config import ConfigError
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.stage import Stage
from dr_jax.pipeline.summary import summarize, write_page
from dr_jax.runtime.files import write_json


def write_report(run: RunContext) -> None:
  """Writes summary.json, report/index.html, and figures beside it."""
  directory = run.workdir.path
  write_json(directory / "summary.json", summarize(run))
  write_page(directory)


def check(run: RunContext) -> None:
  """Checks that figures can be drawn, before anything is trained for them.

  Raises:
    ConfigError: if a search needs matplotlib, and it is not installed.
  """
  if "search" in run.config.stages:
    try:
      report.new_figure(1, 1)
    except ImportError as error:
      raise ConfigError(f"stages: report after search: {error}") from None


STAGE = Stage(
  name="report",
  help="write summary.json, the page and the figures",
  run=write_report,
  single_process=True,
  check=check,
  results=lambda run: (),
  is_done=lambda run: False,
)
