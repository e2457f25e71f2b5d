"""What a run says of all its processes together."""

import collections
import types
import warnings

import pytest

from dr_jax.pipeline.context import Run
from dr_jax.runtime import processes


def told(monkeypatch, mine, before, gathered, *, first=True):
  """What a process says whose share is 0, and what it told the others."""
  sent = []

  def gather(value):
    sent.append(value)
    return [value, *gathered]

  monkeypatch.setattr(processes, "gathered", gather)
  monkeypatch.setattr(processes, "is_first", lambda: first)
  run = types.SimpleNamespace(_unreadable=lambda: collections.Counter(mine))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    Run._tell_of_unreadable(run, "pretrain", collections.Counter(before), 0)
  return [str(warning.message) for warning in caught], sent


def test_unreadable_images_of_a_stage_are_counted_over_all_shares(monkeypatch):
  said, sent = told(
    monkeypatch,
    {"a.png": 3, "b.png": 2},
    {"a.png": 1, "b.png": 2},
    # Another process that feeds the same share, and one that feeds the other.
    [[0, {"a.png": 2}], [1, {"c.png": 1}]],
  )
  assert sent == [[0, {"a.png": 2}]]
  (line,) = said
  assert line.startswith("pretrain: unreadable images: 2; ")
  assert "took their place 3 times since the stage" in line


@pytest.mark.parametrize(("mine", "first"), [({}, True), ({"a.png": 1}, False)])
def test_nothing_is_said_without_any_or_by_other_processes(
  monkeypatch, mine, first
):
  assert told(monkeypatch, mine, {}, [], first=first)[0] == []
