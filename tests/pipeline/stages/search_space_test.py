"""Tests of budgets given as mean bit-widths; the rest is in search_test."""

import types

import numpy as np
import pytest

from dr_jax.pipeline.stages import search_space


def budget(bits, costs, mean):
  problem = types.SimpleNamespace(bits=bits, costs={"bytes": np.array(costs)})
  return search_space.budgets(problem, ("bytes",), mean)


@pytest.mark.parametrize(
  ("mean", "expected"),
  [(8, 1600), (6, 1200), (5.5, 1100), (5, 1000), (2, 400), (9, 1800)],
)
def test_a_budget_of_m_bits_is_what_m_bits_everywhere_would_cost(
  mean, expected
):
  costs = [[1200, 600, 300], [400, 200, 100]]
  assert budget((8, 4, 2), costs, mean) == {"bytes": expected}


def test_a_network_of_one_bit_width_scales_its_budget():
  assert budget((8,), [[1000], [600]], 4) == {"bytes": 800}


def test_a_budget_is_rounded_down():
  assert budget((8, 4), [[9, 4]], 5) == {"bytes": 5}
