"""Tests of what a phase of training reports."""

import types
import warnings

import pytest

from dr_jax.pipeline import training
from dr_jax.runtime import processes


def reported(monkeypatch, mine, before, gathered, *, first=True):
  """The warnings of a process that feeds shard 0, and what it sent."""
  sent = []

  def gather(value):
    sent.append(value)
    return [value, *gathered]

  monkeypatch.setattr(processes, "gathered", gather)
  monkeypatch.setattr(processes, "is_first", lambda: first)
  source = types.SimpleNamespace(unreadable=before)
  run = types.SimpleNamespace(data=types.SimpleNamespace(train=source))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with training._count_unreadable(run, "pretrain", 0):
      source.unreadable = mine
  return [str(warning.message) for warning in caught], sent


def test_unreadable_images_of_a_stage_are_counted_over_all_shards(monkeypatch):
  lines, sent = reported(
    monkeypatch,
    {"a.png": 3, "b.png": 2},
    {"a.png": 1, "b.png": 2},
    # Another process that feeds the same shard, and one that feeds the other.
    [[0, {"a.png": 2}], [1, {"c.png": 1}]],
  )
  assert sent == [[0, {"a.png": 2}]]
  (line,) = lines
  assert line.startswith("pretrain: unreadable images: 2; ")
  assert "took their place 3 times since the stage" in line


@pytest.mark.parametrize(("mine", "first"), [({}, True), ({"a.png": 1}, False)])
def test_no_warning_without_unreadable_images_or_in_other_processes(
  monkeypatch, mine, first
):
  assert reported(monkeypatch, mine, {}, [], first=first)[0] == []
