"""Choice of the fastest program, with clocks that the tests set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.quant.planes import measure


@pytest.fixture
def clock(monkeypatch):
  """Seconds that only programs add to."""
  now = [0.0]
  monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
  return now


def program(clock, durations):
  """Takes these seconds, one after the other; the first call compiles."""
  left = iter(durations)

  def run():
    clock[0] += next(left)
    return jnp.zeros(())

  return run


def test_the_fastest_program_is_that_of_the_least_time(clock):
  programs = {
    "steady": program(clock, [1, 3, 3, 3]),
    "disturbed": program(clock, [9, 8, 2, 7]),
  }
  assert measure.fastest(programs, rounds=3) == "disturbed"


def test_a_program_that_raises_is_left_out(clock):
  def fails():
    raise NotImplementedError("no such instruction")

  programs = {"fails": fails, "slow": program(clock, [1, 5])}
  assert measure.fastest(programs, rounds=1) == "slow"
  with pytest.raises(RuntimeError, match="none of fails runs"):
    measure.fastest({"fails": fails})


def test_programs_are_called_in_turn(clock):
  calls = []
  programs = {name: lambda name=name: calls.append(name) for name in "ab"}
  measure.seconds(programs, rounds=2)
  assert calls == ["a", "b", "a", "b"]


@pytest.mark.parametrize("repeats", [1, 3])
def test_repeated_products_have_the_result_of_one(repeats):
  x = jax.random.normal(jax.random.key(0), (2, 8))
  w = jax.random.normal(jax.random.key(1), (8, 4))
  run = jax.jit(measure.repeated(jnp.dot, repeats))
  np.testing.assert_array_equal(run(x, w), jax.jit(jnp.dot)(x, w))
  operations = str(run.trace(x, w).jaxpr).count("dot_general")
  assert operations == 2
