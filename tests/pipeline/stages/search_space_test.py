"""Tests of budgets given as mean bit-widths; the rest is in search_test."""

import pytest

from dr_jax.pipeline.stages import search_space

BITS = (8, 4, 2)


@pytest.mark.parametrize(
  ("mean", "expected"), [(8, 1600), (6, 1200), (5, 1000), (2, 400), (9, 1800)]
)
def test_a_budget_of_m_bits_is_what_m_bits_everywhere_would_cost(
  mean, expected
):
  totals = [1600, 800, 400]
  assert search_space._interpolated(BITS, totals, mean) == expected


def test_a_network_of_one_bit_width_scales_its_budget():
  assert search_space._interpolated((8,), [1600], 4) == 800
