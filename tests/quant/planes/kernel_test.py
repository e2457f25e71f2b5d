"""The kernel as a GPU gets it: its Triton IR, executed in numpy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import triton_ir

from dr_jax import quant
from dr_jax.quant.planes import kernel

# Of one row, at every bit-width and rule; k and n divide no block, which has
# 32 words, that is 1024 codes, of 32 columns.
ONE_ROW = [
  ((1, 70, 45), bits, rounding, "float32")
  for bits in range(8, 1, -1)
  for rounding in ("half_up", "floor")
]
OTHERS = [
  ((1, 2100, 33), 8, "floor", "bfloat16"),
  ((1, 2100, 33), 7, "half_up", "float32"),
  ((1, 1024, 64), 6, "floor", "float32"),
  ((1, 1, 1), 2, "half_up", "float32"),
  ((16, 70, 45), 8, "half_up", "bfloat16"),
  ((16, 1100, 40), 2, "floor", "bfloat16"),
  ((16, 70, 45), 4, "half_up", "float32"),
  ((5, 70, 45), 5, "floor", "float32"),
  ((20, 1060, 33), 3, "half_up", "bfloat16"),
]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("shape, bits, rounding, dtype", ONE_ROW + OTHERS)
def test_programs_for_gpus_are_exact_and_read_the_needed_planes_alone(
  shape, bits, rounding, dtype
):
  m, k, n = shape
  rng = np.random.default_rng(0)
  codes = rng.integers(-128, 128, (k, n)).astype(np.int8)
  x = jnp.asarray(rng.integers(-4, 5, (m, k)), dtype)
  planes = quant.to_planes(codes, 8)
  count = quant.planes_read(bits, stored_bits=8, rounding=rounding)
  sums, (_, read) = triton_ir.run(
    functools.partial(kernel.plane_sums, bits=bits, count=count), x, planes
  )
  levels = np.asarray(quant.switch_codes(codes, 8, bits, rounding=rounding))
  exact = np.asarray(x.astype(jnp.float32)).astype(int) @ levels.astype(int)
  np.testing.assert_array_equal(sums.sum(0), exact)
  assert read[:count].all() and not read[count:].any()
