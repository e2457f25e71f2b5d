"""Stage report: summary.json, a page, and figures."""

from __future__ import annotations

from dr_jax import report
from dr_jax.config import ConfigError
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.network_record import measure
from dr_jax.pipeline.stages import multi_precision, supernet
from dr_jax.pipeline.stages.stage import Stage
from dr_jax.pipeline.summary import summarize, write_page
from dr_jax.pipeline.workdir import read_object
from dr_jax.report import network_record
from dr_jax.runtime.files import write_json


def write_report(run: RunContext) -> None:
  """Writes summary.json, report/index.html, and figures beside it."""
  directory = run.workdir.path
  write_json(directory / "summary.json", summarize(run))
  _record_network(run)
  write_page(directory)


def _record_network(run):
  """Measures the last trained network, once."""
  path = run.workdir.path / network_record.FILE
  trained = {
    multi_precision.STAGE.name: multi_precision.multi_precision_network,
    supernet.STAGE.name: supernet.supernet,
  }
  for stage in reversed(trained):
    if stage not in run.config.stages:
      continue
    if not path.exists() or _recorded(run, path)["stage"] != stage:
      write_json(path, measure(run, stage, trained[stage](run)))
    return


def _recorded(run, path):
  return read_object(path, network_record.schema_of(run.bits))


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
