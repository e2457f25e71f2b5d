"""The product x @ decode(codes) that reads the planes of its bit-width alone.

With few rows of x, a product takes as long as its weights take to arrive from
memory. At l bits it reads l + 1 planes under half_up and l under floor:

  y = (x @ q_l) * (scale * 2^D),   D = h - l,   sums in float32.

The kernel makes weights in registers alone, the XLA program does for one row.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dr_jax.quant.core import checks
from dr_jax.quant.methods.double_rounding import switch_codes
from dr_jax.quant.planes import lanes, measure
from dr_jax.quant.planes.layout import (
  WORD,
  check_planes,
  from_planes,
  planes_read,
  words_of,
)

if TYPE_CHECKING:
  from jaxtyping import Array, Float, UInt32

BACKENDS = ("auto", "xla", "pallas")

# Products of one timed program: as long as some calls of a program together.
_REPEATS = 50


def matmul(
  x: Float[Array, "... k"],
  planes: UInt32[Array, "planes words n"],
  scale: Float[Array, "..."],
  bits: int,
  *,
  rounding: str,
  stored_bits: int | None = None,
  backend: str = "auto",
) -> Float[Array, "... n"]:
  """Multiplies by the `bits`-bit weights of Double Rounding's codes.

  The result is x @ decode({"codes", "scale"}) but for the order of its sums,
  which are float32, with float32 inputs unrounded.

  Args:
    x: float32 or bfloat16.
    planes: `to_planes` of codes [k, n]; planes below those that `bits` needs
      (`planes_read`) may be missing.
    scale: of the stored codes, [1, n] or one number.
    bits: bit-width in use.
    rounding: how lower codes are made: "half_up" or "floor".
    stored_bits: bits of the stored codes; by default as many as planes. Say it
      where planes are missing.
    backend: "xla", a plain XLA program; "pallas", a kernel for GPUs; "auto",
      the faster of them, which is measured once per kind of GPU, shape and
      bit-width, and "xla" where there is no GPU.

  Returns:
    The dtype of x.

  Raises:
    ValueError: for shapes, dtypes, or bit-widths that do not fit.

  References:
    arXiv 2502.01199, eq. 2, whose ties are chosen to need few planes.

  >>> from dr_jax.quant.planes.layout import to_planes
  >>> planes = to_planes(jnp.array([[100, -9], [8, 7]], jnp.int8), 8)
  >>> x = jnp.array([[1.0, 2.0]])
  >>> matmul(x, planes, jnp.ones((1, 2)), 8, rounding="half_up").tolist()
  [[116.0, 5.0]]
  >>> matmul(x, planes, jnp.ones((1, 2)), 4, rounding="half_up").tolist()
  [[128.0, -16.0]]
  """
  checks.one_of("backend", backend, BACKENDS)
  if x.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"x must be float32 or bfloat16, got {x.dtype}")
  *batch, k = x.shape
  check_planes(planes, k)
  n = planes.shape[2]
  if scale.size not in (1, n):
    raise ValueError(
      f"scale must have 1 or {n} entries, got shape {scale.shape}"
    )
  stored_bits = len(planes) if stored_bits is None else stored_bits
  count = planes_read(bits, stored_bits=stored_bits, rounding=rounding)
  if count > len(planes):
    raise ValueError(
      f"planes must be at least {count} for bits={bits}, got {len(planes)}"
    )
  rows = x.reshape(-1, k)
  if backend == "auto":
    backend = _fastest(rows, planes, bits, count)
  sums = _SUMS[backend](rows, planes, bits, count)
  unit = scale.astype(jnp.float32).reshape(1, -1) * 2.0 ** (stored_bits - bits)
  return (sums * unit).astype(x.dtype).reshape(*batch, n)


def _xla_sums(x, planes, bits, count):
  planes = planes[:count]
  if len(x) == 1:
    return _one_row(x, planes, bits)
  codes = from_planes(planes, x.shape[1])
  if count > bits:
    codes = switch_codes(codes, count, bits, rounding="half_up")
  return _float32_product(x, codes.astype(x.dtype))


def _one_row(x, planes, bits):
  """One pass over the words: no weight is ever stored."""
  count, words, n = planes.shape
  x = jnp.pad(x[0].astype(jnp.float32), (0, words * WORD - x.shape[1]))
  x = x.reshape(WORD, words, 1)
  # XLA:CPU fuses slices of rows; slices of a leading axis it would copy.
  rows = planes.reshape(-1, n)
  loaded = [
    jax.lax.slice_in_dim(rows, plane * words, (plane + 1) * words)
    for plane in range(count)
  ]
  total = jnp.zeros((words, n), jnp.float32)
  for place, codes in lanes.weights(loaded, bits):
    total += x[place] * codes
  # XLA:CPU fuses a reduction with all that it reduces, in a slow library; a
  # product with ones it leaves alone.
  return _float32_product(jnp.ones((1, words), jnp.float32), total)


def _float32_product(x, w):
  return jnp.dot(
    x,
    w,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _pallas_sums(x, planes, bits, count):
  # Only where it is used: Pallas takes longer to import than this package.
  from dr_jax.quant.planes.kernel import plane_sums

  return plane_sums(x, planes, bits, count)


_SUMS = {"xla": _xla_sums, "pallas": _pallas_sums}


def _fastest(x, planes, bits, count):
  if jax.default_backend() != "gpu":
    return "xla"
  shape = *x.shape, planes.shape[2]
  kind = jax.devices()[0].device_kind
  return _measured(kind, shape, str(x.dtype), bits, count)


@functools.cache
def _measured(kind, shape, dtype, bits, count):
  """Measures both programs on the default device, also during a trace."""
  del kind  # A part of the key alone.
  m, k, n = shape

  def program(sums, x, planes):
    run = measure.repeated(lambda x, p: sums(x, p, bits, count), _REPEATS)
    run = jax.jit(run)
    return lambda: run(x, planes)

  with jax.ensure_compile_time_eval():
    x = jnp.ones((m, k), dtype)
    planes = jnp.zeros((count, words_of(k), n), jnp.uint32)
    return measure.fastest(
      {name: program(sums, x, planes) for name, sums in _SUMS.items()}
    )
