"""Tests of profiles: which steps are in a trace, and where it is."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from dr_jax.runtime import processes
from dr_jax.runtime.profile import profiled


@jax.jit
def _named_add(state, batch):
  return state + batch


def run(directory, steps, calls):
  """Calls a step so often; returns the last state and the trace's steps."""
  state = jnp.float32(0)
  with profiled(
    _named_add, steps, directory, name="stage", remaining=calls
  ) as step:
    for _ in range(calls):
      state = step(state, jnp.float32(1))
  assert float(state) == calls
  path = directory / "perfetto_trace.json.gz"
  if not path.exists():
    return None
  events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  assert any("_named_add" in str(event.get("name")) for event in events)
  return sorted(
    int(event["args"]["step_num"])
    for event in events
    if event.get("name") == "step"
  )


@pytest.mark.parametrize(
  ("steps", "calls", "traced"),
  [(2, 9, [3, 4]), (3, 4, [1, 2, 3]), (5, 2, [0, 1])],
)
def test_a_trace_has_the_steps_asked_for(
  tmp_path, capsys, steps, calls, traced
):
  assert run(tmp_path / "a" / "b", steps, calls) == traced
  line = capsys.readouterr().err
  assert line.startswith(f"stage: profile of {len(traced)} steps in {tmp_path}")
  assert "b/perfetto_trace.json.gz; open it at https://ui.perfetto.dev" in line


def test_a_second_trace_takes_the_place_of_the_first(tmp_path):
  assert run(tmp_path, 1, 9) == [3]
  assert run(tmp_path, 2, 9) == [3, 4]
  assert len(list((tmp_path / "plugins" / "profile").iterdir())) == 1


def test_a_stage_that_fails_ends_its_trace(tmp_path):
  with pytest.raises(KeyError):
    with profiled(_named_add, 5, tmp_path, name="stage", remaining=9) as step:
      for _ in range(4):
        step(jnp.float32(0), jnp.float32(1))
      raise KeyError
  assert (tmp_path / "perfetto_trace.json.gz").exists()


def test_nothing_is_traced_without_steps_or_in_another_process(
  tmp_path, monkeypatch
):
  assert run(tmp_path, 0, 9) is None
  monkeypatch.setattr(processes, "is_first", lambda: False)
  assert run(tmp_path, 2, 9) is None
  assert not list(tmp_path.iterdir())
