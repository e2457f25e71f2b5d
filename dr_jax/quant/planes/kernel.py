"""The product with bit-planes as a Pallas kernel for GPUs (Triton).

A program loads one block of words of each needed plane and uses every word 32
times; the last sum, over the blocks of a column, is left to XLA. Nothing else
of the weights is read. Ragged edges are masked.

One row of inputs is multiplied elementwise; several are matrix products, which
bfloat16 computes in tensor cores.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dr_jax.quant.planes import lanes

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Float32, UInt32

# A block of words: 32 columns are a transaction of 128 bytes, and 32 x 32 words
# of 8 planes are 64 registers for each of 128 threads.
WORDS = 32
COLUMNS = 32
WARPS = 4
# A block of several inputs: the least that a matrix product of Triton has.
INPUTS = 16


def plane_sums(
  x: Float[Array, "m k"],
  planes: UInt32[Array, "planes words n"],
  bits: int,
  count: int,
  *,
  interpret: bool = False,
) -> Float32[Array, "m n"]:
  """Sums along k of x times codes, in float32.

  Args:
    x: float32 or bfloat16.
    planes: at least `count` planes of a kernel [k, n] (`layout.to_planes`);
      later ones are not read.
    bits: bit-width of the codes.
    count: `bits` planes, or one more to round by (`layout.planes_read`).
    interpret: run as an XLA program on any device, for tests.
  """
  (m, _), (_, words, n) = x.shape, planes.shape
  blocks = pl.cdiv(words, WORDS)
  inputs = 1 if m == 1 else INPUTS
  program = functools.partial(_one_row if m == 1 else _rows, bits, count)
  sums = pl.pallas_call(
    program,
    out_shape=jax.ShapeDtypeStruct((blocks, m, n), jnp.float32),
    grid=(pl.cdiv(n, COLUMNS), blocks, pl.cdiv(m, inputs)),
    # One stage: there is no loop whose loads could be made ahead.
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
    interpret=interpret,
    name=f"planes_{count}_bits_{bits}",
  )(x, planes)
  return sums.sum(0)


def _one_row(bits, count, x_ref, planes_ref, sums_ref):
  block = pl.program_id(1)
  columns, inside = _block(0, COLUMNS, planes_ref.shape[2])
  loaded = _load_words(planes_ref, count, columns, inside)
  total = jnp.zeros((WORDS, COLUMNS), jnp.float32)
  for place, codes in lanes.weights(loaded, bits):
    rows, there = _rows_of(place, x_ref, planes_ref)
    x = triton.load(x_ref.at[jnp.int32(0), rows], mask=there, other=0)
    total += x.astype(jnp.float32)[:, None] * codes
  out = sums_ref.at[block, jnp.int32(0), columns]
  triton.store(out, total.sum(0), mask=inside)


def _rows(bits, count, x_ref, planes_ref, sums_ref):
  block = pl.program_id(1)
  columns, inside = _block(0, COLUMNS, planes_ref.shape[2])
  inputs, present = _block(2, INPUTS, x_ref.shape[0])
  loaded = _load_words(planes_ref, count, columns, inside)
  total = jnp.zeros((INPUTS, COLUMNS), jnp.float32)
  for place, codes in lanes.weights(loaded, bits):
    rows, there = _rows_of(place, x_ref, planes_ref)
    mask = present[:, None] & there[None]
    x = triton.load(x_ref.at[inputs, rows], mask=mask, other=0)
    total += jnp.dot(
      x,
      codes.astype(x.dtype),  # codes of 8 bits are exact in bfloat16
      precision=jax.lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )
  mask = present[:, None] & inside[None]
  triton.store(sums_ref.at[block, inputs, columns], total, mask=mask)


def _load_words(planes_ref, count, columns, inside):
  """This program's words [WORDS, COLUMNS] of the first `count` planes."""
  words, there = _block(1, WORDS, planes_ref.shape[1])
  mask = there[:, None] & inside[None]
  return [
    triton.load(planes_ref.at[plane, words, columns], mask=mask, other=0)
    for plane in map(jnp.int32, range(count))
  ]


def _rows_of(place, x_ref, planes_ref):
  """The rows of the kernel in bit `place` of this program's words."""
  k, words = x_ref.shape[1], planes_ref.shape[1]
  block = pl.program_id(1) * WORDS
  within = block + jnp.arange(WORDS)
  first = place * words
  return pl.ds(first + block, WORDS), (within < words) & (first + within < k)


def _block(axis, size, end):
  """This program's slice along an axis of the grid, and what of it exists."""
  start = pl.program_id(axis) * size
  return pl.ds(start, size), start + jnp.arange(size) < end
