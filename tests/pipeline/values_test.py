"""Configurations that are accepted, up to the first byte that a run writes."""

import random

import pytest
from unusual import random_values

from dr_jax.config import ConfigError, from_dict
from dr_jax.pipeline import pipeline
from dr_jax.pipeline.context import RunContext


def accepted(rng):
  """Returns a random configuration that `from_dict` accepts."""
  while True:
    try:
      return from_dict(random_values(rng))
    except ConfigError:
      pass


@pytest.mark.slow
def test_a_run_begins_or_ends_in_one_line_that_leaves_no_file(tmp_path):
  rng = random.Random(13)
  ended = 0
  for _ in range(20):
    config = accepted(rng)
    try:
      pipeline.check_stages(config)
      pipeline.check(RunContext(config, tmp_path / "run"))
    except ValueError as error:
      assert "\n" not in str(error), error
      ended += 1
    assert not list(tmp_path.iterdir())
  assert ended < 18
