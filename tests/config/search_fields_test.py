"""Tests of the fields for the stages hessian, supernet and search."""

import pytest
from mixed_job import config

from dr_jax.config import ConfigError


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"search": {"budgets": (0,)}}, r"search\.budgets must be > 0, got 0"),
    (
      {"search": {"budgets": (3, -1.0)}},
      r"search\.budgets must be > 0, got -1\.0",
    ),
    ({"search": {"budgets": ()}}, r"search\.budgets must not be empty"),
    (
      {"search": {"budgets": ("3",)}},
      r"search\.budgets must be a tuple of",
    ),
    (
      {"search": {"budgets": (True,)}},
      r"search\.budgets must be a tuple of",
    ),
    (
      {"search": {"budgets": (float("inf"),)}},
      r"search\.budgets must be <= 64, got inf",
    ),
    (
      {"search": {"strategies": ("best",)}},
      r"strategies must be one of .*greedy.* got 'best'",
    ),
    (
      {"search": {"costs": ("bytes",)}},
      r"costs must be one of stored_bits.* got 'bytes'",
    ),
    ({"search": {"costs": ("latency",)}}, r"search\.latency must be .* got ''"),
    (
      {"search": {"eval_split": "test"}},
      r"search\.eval_split must be one of held_out.* got 'test'",
    ),
    (
      {"search": {"metric": "speed"}},
      r"search\.metric must be one of .* got 'speed'",
    ),
    (
      {"data": {"holdout": 0.0}},
      r"data\.holdout must be > 0 and < 1 .* got 0\.0",
    ),
    (
      {"data": {"holdout": 1.0}},
      r"data\.holdout must be < 1, got 1\.0",
    ),
    (
      {"hessian": {"rel_stderr": 0.0}},
      r"hessian\.rel_stderr must be > 0, got 0\.0",
    ),
    (
      {"hessian": {"max_probes": 7}},
      r"hessian\.max_probes must be >= .*8, got 7",
    ),
    ({"hasb": {"sigma": 1.5}}, r"hasb\.sigma must be <= 1, got 1\.5"),
    (
      {"supernet": {"loss_weights": (1.0,)}},
      r"supernet\.loss_weights must be.*got \(1\.0,\)",
    ),
    (
      {"supernet": {"sampling": "random"}},
      r"supernet\.sampling must be.*got 'random'",
    ),
    (
      {"quant": {"norm": "shared"}},
      r"quant\.norm must be switchable.*got 'shared'",
    ),
    (
      {"search": {"options": {"greedy": 3}}},
      r"options\.greedy must be a group of options, got 3",
    ),
    (
      {"search": {"options": {"best": {}}}},
      r"search\.options must be .*'best'",
    ),
    (
      {"search": {"ties": ("conv1", "conv2")}},
      r"search\.ties must be a tuple of list or tuple",
    ),
    (
      {"search": {"ties": (3,)}},
      r"search\.ties must be .* got 3",
    ),
    (
      {"search": {"budgets": (3, 3.0)}},
      "budgets must be different, got 3 2 times",
    ),
    (
      {"search": {"strategies": ("greedy",) * 2}},
      "must be different, got greedy 2 times",
    ),
  ],
)
def test_an_error_names_field_value_and_constraint(changes, message):
  with pytest.raises(ConfigError, match=message):
    config(**changes)
