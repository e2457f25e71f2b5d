"""Tests of figures without matplotlib."""

import builtins

import pytest

from dr_jax import report


@pytest.fixture
def no_matplotlib(monkeypatch):
  """Lets no import of matplotlib succeed."""
  imports = builtins.__import__

  def refusing(name, *args, **kwargs):
    if name.partition(".")[0] == "matplotlib":
      raise ImportError(name)
    return imports(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", refusing)


@pytest.mark.usefixtures("no_matplotlib")
def test_a_missing_extra_is_named_in_the_error():
  with pytest.raises(ImportError, match=r"pip install 'dr_jax\[report\]'"):
    report.new_figure(1, 1)
