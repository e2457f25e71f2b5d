"""Tests of what commands have in common; how they end: exit_codes_test."""

import subprocess
import sys
import warnings

import pytest

from dr_jax.runtime import command


def test_a_warning_is_one_line(capsys, monkeypatch):
  with warnings.catch_warnings():
    warnings.simplefilter("always")
    monkeypatch.setattr(warnings, "showwarning", command.warn)
    warnings.warn("an image\n is torn", stacklevel=1)
  assert capsys.readouterr() == ("", "warning: an image is torn\n")


def test_errors_that_nobody_reads_do_not_end_with_another(monkeypatch):
  class Gone:
    def write(self, text):
      raise BrokenPipeError

  monkeypatch.setattr(sys, "stderr", Gone())
  command.report("something")
  command.warn("something", UserWarning, "file.py", 3)


def test_what_is_no_flag_is_named():
  command.check_no_arguments(["main"])
  with pytest.raises(ValueError, match="must be flags, --name=value, got 'x'"):
    command.check_no_arguments(["main", "x", "y"])


def test_it_loads_no_array_library():
  program = (
    "import sys; from dr_jax.runtime import command;"
    "assert not {'jax', 'numpy', 'absl'} & {*sys.modules}"
  )
  subprocess.run([sys.executable, "-c", program], check=True)
