"""BitWave: int8 codes whose zero bit columns are neither stored nor computed.

  q_8 = clip(round(w / s), -127, 127),   s = max|w| / 127
  w_hat = sign(q_8) nearest(|q_8|, M) s

Codes are in sign-magnitude form: a sign and 7 magnitude columns. M is a set of
columns that a group of G weights shares; nearest(m, M) is the number nearest
to m whose ones are all in M. A bit-width of b leaves a group at most b - 1
columns (bit-flip), chosen to make its squared error smallest. All of it is
integer arithmetic on q_8, which is all that is stored.

Shi et al., "BitWave: Exploiting Column-Based Bit-Level Sparsity for Deep
Learning Acceleration", HPCA 2024. We know only its abstract: the scale, the
rule for ties, the groups of a depthwise kernel, the file format and the
gradient are our choices, and no parity is claimed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dr_jax.quant.core import checks, exact_mean, grid
from dr_jax.quant.core.interface import Integers, Storage, WeightQuantizer
from dr_jax.quant.core.packing import packed_size
from dr_jax.quant.core.straight_through import straight_through
from dr_jax.quant.registry import Recipe, method

if TYPE_CHECKING:
  from jaxtyping import Array, Int

GROUPS = (8, 16, 32)
_HIGH, _COLUMNS = 127, 7
# Sets of columns as 7-bit masks, those with few columns first, and how many
# have at most 0, 1, ..., 7 columns.
_MASKS = np.array(sorted(range(_HIGH + 1), key=int.bit_count), np.int32)
_COUNTS = np.cumsum([math.comb(_COLUMNS, n) for n in range(_COLUMNS + 1)])


@method(bitwave=Recipe("bitwave", curriculum="post_training"))
def bitwave(
  bits: Sequence[int] = (8, 6, 4, 2),
  *,
  group: int = 8,
  per_channel: bool = True,
) -> WeightQuantizer:
  """Builds the BitWave weight quantizer.

  Shared between bit-widths: the weights, the int8 codes and the scale. 8 bits
  are the codes themselves; b bits keep a sign and at most b - 1 of the 7
  magnitude columns of each group. Of the sets with the smallest squared error
  the one with the fewest columns is taken, of these the lowest mask; a
  magnitude midway between two numbers goes to the lower one.

  A group is `group` consecutive input channels at one window position and
  output channel; the last may be smaller. A kernel with one input channel
  (depthwise) has its window positions grouped instead.

  Stored: a sign per weight, 7 mask bits per group, the columns that are not
  zero in the whole group, and float32 scales. `stored_bits` is 8, what a weight
  costs where no column is skipped, without the mask; `storage.size` counts the
  actual bytes. Choose it to shrink a trained 8-bit model without training, for
  hardware that computes column by column.

  Params: {}. The scale is max|w| / 127, per channel [1, ..., 1, c_out] or per
  tensor. The gradient is straight-through: that of w_hat, unchanged.

  Args:
    bits: candidate bit-widths in 2..8, highest first.
    group: weights that share their columns: 8, 16 or 32.
    per_channel: one scale per entry of the last axis, else one per tensor.

  Raises:
    ValueError: for bits outside 2..8 or not descending, another group, or,
      outside jit, NaN or infinite weights.

  References:
    Shi et al., HPCA 2024.

  >>> quantizer = bitwave((8, 2))
  >>> w = jnp.array([[127.0], [3.0], [-70.0]])
  >>> quantizer.fake_quantize({}, w, 1)[:, 0].tolist()  # one column: 64
  [64.0, 0.0, -64.0]
  """
  bits = checks.check_bits(bits, method="bitwave")
  checks.one_of("group", group, GROUPS)

  def init(w):
    return {}

  def fake_quantize(params, w, index):
    w = jnp.asarray(w)
    encoded = encode(params, jax.lax.stop_gradient(w))
    w_hat = decode(encoded, index)
    return straight_through(w, w_hat.astype(w.dtype))

  def encode(params, w):
    del params
    w = jnp.asarray(w).astype(jnp.float32)
    axes = exact_mean.channel_axes(w.ndim, per_channel=per_channel)
    largest = exact_mean.largest_magnitude(w, axes)
    scale = grid.positive(largest * (1 / _HIGH))
    codes = grid.first_codes(w, scale, -_HIGH, _HIGH)
    return {"codes": codes.astype(jnp.int8), "scale": scale}

  def integers(encoded, index):
    target = jnp.asarray(bits, jnp.int32)[index]
    codes = _flip(encoded["codes"], target, group=group)
    return Integers(codes.astype(jnp.int8), encoded["scale"])

  def decode(encoded, index):
    codes, scale = integers(encoded, index)
    return codes.astype(jnp.float32) * scale

  return WeightQuantizer(
    bits=bits,
    init=init,
    fake_quantize=fake_quantize,
    encode=encode,
    decode=decode,
    stored_bits=8,
    storage=_storage(bits, group),
    integers=integers,
  )


def skipped_columns(
  codes: Int[Array, "..."], bits: int, *, group: int = 8
) -> float:
  """Returns the fraction of magnitude columns that are zero in a whole group.

  Args:
    codes: integers in -127..127, [*window, c_in, c_out], as `encode` returns.
    bits: bit-width that they are flipped to first, 2..8.
    group: weights that share their columns: 8, 16 or 32.

  Returns:
    Of the 7 columns of every group, the fraction that need not be stored.

  Raises:
    ValueError: for bits outside 2..8, another group, or codes that are not
      integers or outside -127..127.

  >>> codes = jnp.array([[4], [-4], [36], [0]], jnp.int8)
  >>> round(7 * skipped_columns(codes, 8))  # all but 32 and 4
  5
  """
  bits = checks.check_integer("bits", bits, 2, 8)
  checks.one_of("group", group, GROUPS)
  codes = checks.check_integers("codes", codes)
  low, high = int(codes.min()), int(codes.max())
  if low < -_HIGH or high > _HIGH:
    raise ValueError(f"codes must be in -{_HIGH}..{_HIGH}, got {low}..{high}")
  planes = _planes(_flip(codes, jnp.int32(bits), group=group), group)
  return 1 - float(planes.any(2).mean())


@functools.partial(jax.jit, static_argnames="group")
def _flip(codes, bits, *, group):
  """The codes at `bits`, an int32 scalar; dtype int32."""
  codes = codes.astype(jnp.int32)
  # A group lives on one device; only Explicit meshes need that spelled out.
  magnitudes, sharding = jnp.abs(codes), jax.typeof(codes).sharding
  if any(axis is not None for axis in sharding.spec[:-1]):
    spec = PartitionSpec(*[None] * (codes.ndim - 1), sharding.spec[-1])
    whole = NamedSharding(sharding.mesh, spec)
    magnitudes = jax.sharding.reshard(magnitudes, whole)
  magnitudes = _grouped(magnitudes, group)
  masks = jnp.asarray(_MASKS)

  def ranked(i):
    # Error, number of columns and mask in one integer, below 2^30: its
    # minimum over the masks is the choice, ties included.
    error = jnp.square(magnitudes - _nearest(magnitudes, masks[i]))
    order = (jax.lax.population_count(masks[i]) << _COLUMNS) | masks[i]
    return (error.sum(-2, keepdims=True) << 10) | order

  # 8 bits change nothing: no need to search.
  end = jnp.where(bits == 8, 1, jnp.asarray(_COUNTS, jnp.int32)[bits - 1])
  best = jax.lax.fori_loop(
    1, end, lambda i, found: jnp.minimum(found, ranked(i)), ranked(0)
  )
  flipped = _ungrouped(_nearest(magnitudes, best & _HIGH), codes.shape)
  flipped = jnp.sign(codes) * flipped
  return jnp.where(bits == 8, codes, flipped)


def _nearest(magnitudes, mask):
  """Numbers nearest to `magnitudes` whose ones are in `mask`; ties go down."""
  missing = magnitudes & ~mask
  # Ones from the highest missing one down: these must change.
  tail = missing | missing >> 1
  tail |= tail >> 2
  tail |= tail >> 4
  head = magnitudes & mask & ~tail
  below = head | (mask & tail)
  # The next number up sets the lowest free column and clears those below it.
  free = mask & ~magnitudes & ~tail
  step = free & -free
  above = (head & -step) | step
  down = (free == 0) | (magnitudes - below <= above - magnitudes)
  return jnp.where(down, below, above)


def _layout(shape, group):
  """Returns window positions, channels, and weights in a full group."""
  *window, channels, _ = shape
  positions = math.prod(window)
  if channels == 1:
    positions, channels = 1, positions
  return positions, channels, min(group, channels)


def _grouped(x, group):
  """[*window, c_in, c_out] as [positions, groups, weights, c_out], padded."""
  positions, channels, members = _layout(x.shape, group)
  # Explicit meshes allow axes to be merged or split, not both at once.
  x = x.reshape(-1, x.shape[-1]).reshape(positions, channels, -1)
  pad = jnp.pad if isinstance(x, jax.Array) else np.pad
  x = pad(x, ((0, 0), (0, -channels % members), (0, 0)))
  return x.reshape(positions, -1, members, x.shape[-1])


def _ungrouped(x, shape):
  """Inverse of `_grouped`."""
  positions, groups, members, outputs = x.shape
  x = x.reshape(positions, groups * members, outputs)
  channels = math.prod(shape) // (positions * outputs)
  return x[:, :channels].reshape(-1, outputs).reshape(shape)


def _by_group(x, group):
  """[*window, c_in, c_out] in numpy as [all groups, weights], padded."""
  x = _grouped(np.asarray(x), group).swapaxes(2, 3)
  return x.reshape(-1, x.shape[-1])


def _planes(codes, group):
  """Magnitudes as bool [all groups, 7 columns, weights]."""
  magnitudes = np.abs(_by_group(codes, group))
  return (magnitudes[:, None, :] >> np.arange(_COLUMNS)[:, None]) & 1 == 1


def _kept(used, shape, group):
  """Which bits are stored: bool [all groups, 7, weights], from [., 7]."""
  real = _by_group(np.ones(shape, bool), group)
  return used[:, :, None] & real[:, None, :]


def _storage(bits, group):
  """Three streams of bits, the first in the lowest bit of the first byte."""

  def pack(encoded):
    codes = np.asarray(encoded["codes"])
    planes = _planes(codes, group)
    used = planes.any(2)
    streams = {
      "signs": codes < 0,
      "masks": used,
      "columns": planes[_kept(used, codes.shape, group)],
    }
    packed = {
      name: np.packbits(stream, bitorder="little")
      for name, stream in streams.items()
    }
    return {**packed, "scale": np.asarray(encoded["scale"])}

  def unpack(packed, shape):
    positions, channels, members = _layout(shape, group)
    grouped = (positions, -(-channels // members), shape[-1])
    used = _bits(packed["masks"], (math.prod(grouped), _COLUMNS))
    kept = _kept(used, shape, group)
    count = int(kept.sum())
    size, given = packed_size(count, 1), len(packed["columns"])
    if given != size:
      raise ValueError(
        f"columns must have {size} bytes for {count} bits, got {given}"
      )
    planes = np.zeros(kept.shape, np.int32)
    planes[kept] = _bits(packed["columns"], (count,))
    magnitudes = (planes << np.arange(_COLUMNS)[:, None]).sum(1)
    magnitudes = magnitudes.reshape(*grouped, members).swapaxes(2, 3)
    magnitudes = _ungrouped(magnitudes, shape)
    negative = _bits(packed["signs"], shape)
    codes = np.where(negative, -magnitudes, magnitudes).astype(np.int8)
    return {"codes": jnp.asarray(codes), "scale": jnp.asarray(packed["scale"])}

  def layout(encoded):
    shape = encoded["codes"].shape
    positions, channels, members = _layout(shape, group)
    groups = positions * -(-channels // members) * shape[-1]
    lengths = {
      "signs": packed_size(math.prod(shape), 1),
      "masks": packed_size(groups * _COLUMNS, 1),
    }
    streams = {
      name: jax.ShapeDtypeStruct((length,), jnp.uint8)
      for name, length in lengths.items()
    }
    return {**streams, "columns": None, "scale": encoded["scale"]}

  def size(encoded, index):
    target = jnp.int32(bits[index])
    codes = _flip(jnp.asarray(encoded["codes"]), target, group=group)
    packed = pack({**encoded, "codes": codes})
    return sum(array.nbytes for array in packed.values())

  ranges = (
    ("codes", -_HIGH, _HIGH),
    ("scale", *grid.SCALE_RANGE),
  )
  return Storage(pack, unpack, size, layout, ranges)


def _bits(stream, shape):
  """The first bits of a stream, as bool of a shape."""
  bits = np.unpackbits(
    np.asarray(stream), count=math.prod(shape), bitorder="little"
  )
  return bits.reshape(shape) == 1
