"""Tests of what budgets choose."""

import itertools
import pathlib

import pytest
from small_artifact import SERVED as BITS

from dr_jax import allocate, deploy


def test_a_budget_takes_the_most_bytes_that_fit(artifact, mixed):
  served = deploy.Switchable(artifact, allocations=[mixed])
  sizes = {bits: artifact.bytes_at(bits) for bits in (*BITS, mixed)}
  order = sorted(sizes, key=sizes.get, reverse=True)
  assert order == [8, 4, mixed, 2] or order == [8, mixed, 4, 2]
  assert [choice.bits for choice in served.choices] == order
  for bits in order:
    served.switch(budget_bytes=sizes[bits])
    assert served.bits == bits
  for smaller, bits in itertools.pairwise(reversed(order)):
    served.switch(budget_bytes=sizes[bits] - 1)
    assert served.bits == smaller
  served.switch(budget_bytes=10**9)
  assert served.bits == 8


def test_a_budget_takes_the_highest_accuracy_where_it_is_given(artifact, mixed):
  served = deploy.Switchable(
    artifact,
    allocations=[mixed],
    accuracy={8: 97.0, 4: 98.0, 2: 90.0, mixed: 97.0},
  )
  # Of equals, what was given.
  assert [choice.bits for choice in served.choices] == [4, mixed, 8, 2]
  served.switch(budget_bytes=10**9)
  assert served.bits == 4


def test_allocations_are_read_from_files_of_the_export_stage(
  artifact, mixed, tmp_path
):
  mixed.save(tmp_path / "greedy_4.json")
  served = deploy.Switchable(artifact, allocations=[tmp_path / "greedy_4.json"])
  assert mixed in [choice.allocation for choice in served.choices]


@pytest.fixture(scope="module")
def latency(mixed):
  """Times that fall with bits, and fastest at 2 in one layer alone."""
  return allocate.LatencyTable(
    network={8: 20.0, 4: 12.0, 2: 8.0},
    layers={name: {8: 2.0, 4: 1.0, 2: 0.5} for name in mixed},
    measured={},
  )


def test_a_budget_of_time_takes_the_most_accurate_that_is_fast_enough(
  artifact, mixed, latency, tmp_path
):
  latency.save(tmp_path / "latency.json")
  served = deploy.Switchable(
    artifact, allocations=[mixed], latency=tmp_path / "latency.json"
  )
  bits = list(mixed.values())
  ms = 20.0 - bits.count(4) - 1.5 * bits.count(2)
  assert 12.0 < ms < 20.0
  assert {c.bits: c.milliseconds for c in served.choices} == {
    **{8: 20.0, 4: 12.0, 2: 8.0},
    mixed: ms,
  }
  between = next(c.bits for c in served.choices if c.bits != 8)
  for budget, expected in (
    *((20, 8), (19.9, between)),
    *((12.5, 4), (12.0, 4), (11.9, 2), (8.0, 2)),
  ):
    served.switch(budget_ms=budget)
    assert served.bits == expected
  with pytest.raises(
    ValueError, match="budget_ms must be >= 8, the smallest choice, got 7.5"
  ):
    served.switch(budget_ms=7.5)
  with pytest.raises(ValueError, match="budget_ms must be a number, got '9'"):
    served.switch(budget_ms="9")
  assert served.bits == 2


def test_a_latency_table_of_another_network_is_an_error(artifact, latency):
  other = latency._replace(layers=latency.layers | {"conv": {8: 1.0}})
  with pytest.raises(ValueError, match=r"unknown layers \['conv'\]"):
    deploy.Switchable(artifact, latency=other)


def test_a_budget_below_the_smallest_choice_names_it(served, artifact):
  smallest = artifact.bytes_at(2)
  with pytest.raises(
    ValueError,
    match=f"budget_bytes must be >= {smallest}, the smallest .* got 100",
  ):
    served.switch(budget_bytes=100)


def test_wrong_choices_are_errors_at_once(artifact, mixed):
  with pytest.raises(ValueError, match="must be one of .*, got 3"):
    deploy.Switchable(artifact, allocations=[dict.fromkeys(mixed, 3)])
  with pytest.raises(ValueError, match="unknown layers"):
    deploy.Switchable(artifact, allocations=[{"conv": 4}])
  with pytest.raises(ValueError, match="must be one of .*, got 3"):
    deploy.Switchable(artifact, bits=3)
  with pytest.raises(
    ValueError, match="accuracy must have every choice, but lacks 2"
  ):
    deploy.Switchable(artifact, accuracy={8: 1.0, 4: 1.0})
  for value in (None, "97.1", float("nan")):
    with pytest.raises(
      ValueError, match=r"accuracy\[4\] must be a number, got"
    ):
      deploy.Switchable(artifact, accuracy={8: 1.0, 4: value, 2: 0.5})
  for one in ("mixed.json", pathlib.Path("mixed.json"), mixed):
    with pytest.raises(ValueError, match="allocations must be a list of files"):
      deploy.Switchable(artifact, allocations=one)
