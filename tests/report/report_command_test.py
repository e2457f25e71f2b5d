"""Tests of `python -m dr_jax.report`, in this process."""

import sys
import types

import matplotlib.image
import pytest
import report_files

from dr_jax import report
from dr_jax.report import __main__ as report_command
from dr_jax.runtime import command


@pytest.fixture
def run_command(capsys, monkeypatch):
  """Runs the command; returns exit code, standard output and error."""

  def run(*directories, output=None):
    flag = types.SimpleNamespace(value=output)
    monkeypatch.setattr(report_command, "_OUTPUT", flag)
    with pytest.raises(SystemExit) as ended:
      command.reporting(report_command.write_page, "WORKDIR...")(
        ["report", *map(str, directories)]
      )
    return ended.value.code, *capsys.readouterr()

  return run


def test_a_run_gets_its_page_and_figures(tmp_path, run_command):
  run = report_files.write_run(tmp_path / "run")
  page = run / "report" / "index.html"
  assert run_command(run) == (0, f"{page}\n", "")
  assert page.read_text() == report.run_page(report.read_run(run))
  for name in ("accuracy", "pareto"):
    path = page.with_name(f"{name}.png")
    assert matplotlib.image.imread(path).shape[0] > 100
    assert "<svg" in path.with_suffix(".svg").read_text()


def test_a_comparison_gets_its_page_and_figure(tmp_path, run_command):
  compared = report_files.write_comparison(tmp_path / "compared")
  page = compared / "report" / "index.html"
  assert run_command(compared) == (0, f"{page}\n", "")
  assert "<h1>compared</h1>" in page.read_text()
  assert "<svg" in page.with_name("compare.svg").read_text()


def test_several_runs_get_one_page(tmp_path, run_command, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in "ab":
    report_files.write_run(tmp_path / name)
  assert run_command("a", "b") == (0, "runs.html\n", "")
  assert "<td>a</td>" in (tmp_path / "runs.html").read_text()
  assert run_command("a", "b", output="c.html")[0] == 0
  assert (tmp_path / "c.html").read_text() == (
    tmp_path / "runs.html"
  ).read_text()


def test_another_file_can_have_the_page_of_a_run(tmp_path, run_command):
  run, page = report_files.write_run(tmp_path / "run"), tmp_path / "page.html"
  assert run_command(run, output=str(page)) == (0, f"{page}\n", "")
  assert page.exists() and not (run / "report" / "index.html").exists()


@pytest.mark.parametrize("others", [(), ("run",)])
def test_a_directory_without_a_run_is_named_in_one_line(
  tmp_path, run_command, monkeypatch, others
):
  monkeypatch.chdir(tmp_path)
  report_files.write_run(tmp_path / "run")
  code, out, err = run_command(*others, "empty")
  assert (code, out) == (2, "")
  assert err == (
    "error: empty must be the directory of a run whose stage report is done, "
    "but has no summary.json\n"
  )


def test_a_missing_extra_is_one_line(tmp_path, run_command, monkeypatch):
  run = report_files.write_run(tmp_path / "run")
  monkeypatch.setitem(sys.modules, "plotly.offline", None)
  assert run_command(run) == (
    2, "", "error: pages need plotly: pip install 'dr_jax[report]'\n"
  )  # fmt: skip
