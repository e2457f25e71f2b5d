"""Tests of where compiled programs are kept."""

import jax
import pytest

from dr_jax.runtime import compilation


@pytest.fixture
def told(monkeypatch):
  """What JAX is told, in place of telling it."""
  options = {}
  monkeypatch.setattr(jax.config, "update", options.__setitem__)
  return options


@pytest.fixture
def nothing_known():
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def test_every_program_is_kept_below_the_users_cache(
  nothing_known, told, monkeypatch
):
  name = "jax_persistent_cache_min_compile_time_secs"
  monkeypatch.delenv(name.upper(), raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
  compilation.cache_on_disk()
  assert told == {
    "jax_compilation_cache_dir": "/somewhere/dr_jax/jax",
    name: 0.0,
  }


def test_options_that_the_user_set_are_kept(nothing_known, told, monkeypatch):
  name = "jax_persistent_cache_min_compile_time_secs"
  monkeypatch.setenv(name.upper(), "2")
  compilation.cache_on_disk()
  assert list(told) == ["jax_compilation_cache_dir"]


def test_a_cache_directory_that_the_user_set_is_kept(told):
  assert jax.config.jax_compilation_cache_dir is not None  # by conftest
  compilation.cache_on_disk()
  assert told == {}


@pytest.mark.parametrize("cache", ["", "relative/cache"])
def test_a_cache_that_is_not_absolute_is_that_of_the_home_directory(
  nothing_known, told, monkeypatch, cache
):
  monkeypatch.setenv("XDG_CACHE_HOME", cache)
  monkeypatch.setenv("HOME", "/home/someone")
  compilation.cache_on_disk()
  known = told["jax_compilation_cache_dir"]
  assert known == "/home/someone/.cache/dr_jax/jax"


def test_a_user_without_a_home_has_no_cache(nothing_known, told, monkeypatch):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.delenv("HOME")

  def unknown(uid):
    raise KeyError(uid)

  monkeypatch.setattr("pwd.getpwuid", unknown)
  compilation.cache_on_disk()
  assert "jax_compilation_cache_dir" not in told
