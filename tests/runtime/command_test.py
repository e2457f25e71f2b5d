"""Tests of what commands have in common; how they end: exit_codes_test."""

import subprocess
import sys
import types
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


@pytest.mark.parametrize(
  ("names", "given", "message"),
  [
    ((), ["x", "y"], "must be flags, --name=value, got 'x'"),
    (("FILE",), [], "must be FILE and flags, --name=value, got no FILE"),
    (("FILE",), ["x", "y"], "must be FILE and flags, --name=value, got 'y'"),
    (("RUN...",), [], r"must be RUN\.\.\. and flags, .* got no RUN\.\.\."),
  ],
)
def test_arguments_that_are_no_flags_are_counted(names, given, message):
  command.check_arguments(["main", *names], *names)
  with pytest.raises(ValueError, match=message):
    command.check_arguments(["main", *given], *names)


def test_a_last_argument_can_be_repeated():
  command.check_arguments(["main", "x", "y", "z"], "FILE", "RUN...")


def test_it_loads_no_array_library():
  program = (
    "import sys; from dr_jax.runtime import command;"
    "assert not {'jax', 'numpy', 'absl'} & {*sys.modules}"
  )
  subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
  ("value", "message"),
  [(None, "--bits must be set"), ("", "--bits must not be empty, got ''")],
)
def test_a_flag_that_is_required_needs_a_value(value, message):
  given = types.SimpleNamespace(name="artifact", value="model")
  flag = types.SimpleNamespace(name="bits", value=value)
  with pytest.raises(ValueError, match=message):
    command.required(given, flag)
