"""BitWave against brute force over columns, and bytes counted by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dr_jax import quant

EVERY = (8, 7, 6, 5, 4, 3, 2)


def spanned(mask):
  return np.array([v for v in range(128) if v & ~mask == 0])


SETS = sorted(range(128), key=lambda mask: (mask.bit_count(), mask))
SPANNED = {mask: spanned(mask) for mask in SETS}


def best_in_group(magnitudes, bits):
  """Tries all sets of columns; the first smallest error wins, ties go down."""
  found, smallest = magnitudes, math.inf
  for mask in SETS:
    if mask.bit_count() > bits - 1:
      break
    values = SPANNED[mask]  # ascending: argmin takes the lower of two
    distances = np.abs(magnitudes[:, None] - values)
    error = (distances.min(1) ** 2).sum()
    if error < smallest:
      smallest, found = error, values[distances.argmin(1)]
  return found


def groups(shape, group):
  """Yields the positions of every group, as index arrays of the kernel."""
  *window, c_in, c_out = shape
  taps = list(itertools.product(*map(range, window)))
  for c in range(c_out):
    if c_in == 1:
      runs = [[(*tap, 0, c) for tap in taps]]
    else:
      runs = [[(*tap, i, c) for i in range(c_in)] for tap in taps]
    for run in runs:
      for start in range(0, len(run), group):
        yield tuple(np.array(run[start : start + group]).T)


def flipped(codes, bits, group):
  out = codes.astype(np.int64)
  for where in groups(codes.shape, group):
    out[where] = best_in_group(np.abs(out[where]), bits)
  return np.sign(codes) * out


def decoded(codes, bits, group=8):
  """The integers that `codes` stand for at `bits`."""
  scale = jnp.ones((1,) * (codes.ndim - 1) + (codes.shape[-1],))
  quantizer = quant.bitwave((bits,), group=group)
  return quantizer.decode({"codes": jnp.asarray(codes), "scale": scale}, 0)


def random_codes(shape, seed=0):
  spread = np.random.default_rng(seed).normal(size=shape) * 40
  return np.clip(np.rint(spread), -127, 127).astype(np.int8)


@pytest.mark.parametrize(
  "shape, group",
  [
    ((2, 2, 16, 3), 8),
    ((1, 1, 12, 4), 8),  # groups of 8 and 4
    ((3, 3, 3, 4), 8),  # one group of 3 at each window position
    ((3, 3, 1, 5), 8),  # depthwise: 8 and 1 window positions
    ((40, 3), 16),
    ((64, 2), 32),
    ((1, 6), 8),
  ],
)
@pytest.mark.parametrize("bits", [7, 6, 4, 3, 2])
def test_every_group_gets_the_columns_with_the_smallest_error(
  shape, group, bits
):
  codes = random_codes(shape, seed=bits)
  expected = flipped(codes, bits, group)
  np.testing.assert_array_equal(decoded(codes, bits, group), expected)


@pytest.mark.parametrize("bits", EVERY)
def test_every_code_alone_keeps_its_nearest_number_with_few_ones(bits):
  codes = np.arange(-127, 128, dtype=np.int8).reshape(1, -1)
  few = [v for v in range(128) if v.bit_count() <= bits - 1]
  distance = [min(abs(abs(int(q)) - v) for v in few) for q in codes[0]]
  out = np.asarray(decoded(codes, bits))[0]
  np.testing.assert_array_equal(np.abs(out - codes[0]), distance)
  assert all(int(abs(q)).bit_count() <= bits - 1 for q in out)


def test_few_groups_by_hand():
  codes = np.zeros((8, 5), np.int8)
  # One column, {64}: 96 is midway between 64 and 128, which no 7 bits can hold.
  codes[:, 0] = [64, -64, 0, 96, 127, 70, 10, -40]
  # {8} and {16} have error 16 + 16 each: the lower mask.
  codes[:2, 1] = [12, -12]
  # Two of three columns: the error is smallest without {1}.
  codes[:4, 2] = [65, 8, 73, -64]
  codes[:, 3] = -3  # {1} and {2} would be free, {2} and {4} are as near
  np.testing.assert_array_equal(
    np.asarray(decoded(codes, 2)).T,
    [
      [64, -64, 0, 64, 64, 64, 0, -64],
      [8, -8, 0, 0, 0, 0, 0, 0],
      [64, 0, 64, -64, 0, 0, 0, 0],
      [-2] * 8,
      [0] * 8,
    ],
  )
  np.testing.assert_array_equal(
    decoded(codes, 3)[:4, 2],
    [64, 8, 72, -64],  # 1 goes down, to 0
  )
  np.testing.assert_array_equal(decoded(codes, 8), codes)


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_scale_maps_the_largest_weight_to_127(per_channel):
  w = np.array([[0.5, -8.0], [-1.0, 3.0], [0.25, 0.0]], np.float32)
  quantizer = quant.bitwave(per_channel=per_channel)
  assert quantizer.init(w) == {}
  encoded = quantizer.encode({}, w)
  largest = [[1.0, 8.0]] if per_channel else [[8.0]]
  np.testing.assert_allclose(
    encoded["scale"], np.array(largest) / 127, rtol=1e-6
  )
  # 0.5 * 127 = 63.5 and 0.25 * 127 = 31.75; 3 * 127 / 8 = 47.6.
  first = [64, -127, 32] if per_channel else [8, -16, 4]
  np.testing.assert_array_equal(encoded["codes"][:, 0], first)
  np.testing.assert_array_equal(encoded["codes"][:, 1], [-127, 48, 0])
  np.testing.assert_allclose(
    quantizer.fake_quantize({}, w, 0), w, atol=8 / 127 / 2
  )


@pytest.mark.parametrize("index", range(4))
def test_gradient_passes_straight_through(index):
  w = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
  g = np.sin(10 * w)
  quantizer = quant.bitwave()
  _, pull = jax.vjp(lambda w: quantizer.fake_quantize({}, w, index), w)
  np.testing.assert_array_equal(pull(g)[0], g)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
  "shape, spec",
  [
    ((3, 3, 12, 8), P(None, None, "x", "y")),
    ((3, 3, 1, 8), P(None, None, None, "y")),
    ((24, 8), P(("x", "y"))),
  ],
)
def test_groups_may_span_devices(kind, shape, spec):
  w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  quantizer = quant.bitwave((8, 4))
  run = jax.jit(quantizer.fake_quantize)
  expected = run({}, w, jnp.int32(1))
  mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
  placed = jax.device_put(w, NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    found = run({}, placed, jnp.int32(1))
  np.testing.assert_array_equal(found, expected)
  # The array brings its mesh along.
  found = run({}, placed, jnp.int32(1))
  np.testing.assert_array_equal(found, expected)


def test_columns_that_are_zero_are_not_stored():
  codes = np.zeros((9, 2), np.int8)
  codes[:, 0] = [4, -4, 0, 36, 32, 0, 0, -36, 65]  # {4, 32}; then {1, 64}
  codes[8, 1] = -3  # nothing; then {1, 2}
  quantizer = quant.bitwave((8, 2))
  scale = jnp.ones((1, 2))
  encoded = {"codes": jnp.asarray(codes), "scale": scale}
  packed = quantizer.storage.pack(encoded)
  assert set(packed) == {"signs", "masks", "columns", "scale"}
  # Row by row, both channels: -4, -36 and -3 are bits 2, 14 and 17.
  signs = (1 << 2) | (1 << 14) | (1 << 17)
  np.testing.assert_array_equal(
    packed["signs"], list(signs.to_bytes(3, "little"))
  )
  # Groups: channels 0..7 of either output, then channel 8 of either.
  masks = 0b0100100 | (0 << 7) | (0b1000001 << 14) | (0b0000011 << 21)
  np.testing.assert_array_equal(
    packed["masks"], list(masks.to_bytes(4, "little"))
  )
  # {4}: weights 0, 1, 3, 7; {32}: 3, 4, 7; two columns of one bit each, twice.
  np.testing.assert_array_equal(
    packed["columns"], [0b10001011, 0b10011000, 0b1111]
  )
  assert quantizer.storage.size(encoded, 0) == 3 + 4 + 3 + 8
  # At 2 bits: {32}, {}, {64} and {2}, in 8 + 0 + 1 + 1 column bits.
  assert quantizer.storage.size(encoded, 1) == 3 + 4 + 2 + 8


@pytest.mark.parametrize(
  "shape, group", [((3, 3, 12, 5), 8), ((3, 3, 1, 7), 16), ((70, 3), 32)]
)
def test_packing_round_trips_and_sizes_are_those_of_the_packed_codes(
  shape, group
):
  codes = random_codes(shape)
  quantizer = quant.bitwave(EVERY, group=group)
  storage = quantizer.storage
  scale = jnp.ones((1,) * (len(shape) - 1) + shape[-1:])
  for index in range(len(EVERY)):
    encoded = {"codes": jnp.asarray(codes), "scale": scale}
    exact = quantizer.decode(encoded, index).astype(jnp.int8)
    packed = storage.pack({"codes": exact, "scale": scale})
    back = storage.unpack(packed, shape)
    assert back["codes"].dtype == jnp.int8
    np.testing.assert_array_equal(back["codes"], exact)
    assert storage.size(encoded, index) == sum(
      a.nbytes for a in packed.values()
    )
    columns = sum(
      bits_of(exact[where]).any(0).sum() * len(where[0])
      for where in groups(shape, group)
    )
    assert packed["columns"].size == -(-columns // 8)


def bits_of(codes):
  return (np.abs(np.asarray(codes))[:, None] >> np.arange(7)) & 1


def test_a_weight_of_zeros_stores_no_column():
  quantizer = quant.bitwave()
  encoded = quantizer.encode({}, np.zeros((3, 3, 8, 4), np.float32))
  packed = quantizer.storage.pack(encoded)
  assert packed["columns"].size == 0
  back = quantizer.storage.unpack(packed, (3, 3, 8, 4))
  np.testing.assert_array_equal(back["codes"], encoded["codes"])


def test_skipped_columns_are_a_fraction_of_seven_per_group():
  codes = np.zeros((16, 1), np.int8)
  codes[:8, 0] = [4, -4, 0, 36, 32, 0, 0, -36]  # two columns
  codes[8:, 0] = [1, 2, 4, 8, 16, 32, 64, -127]  # seven
  assert quant.skipped_columns(codes, 8) == pytest.approx(5 / 14)
  assert quant.skipped_columns(codes, 8, group=16) == 0
  assert quant.skipped_columns(codes, 2) == pytest.approx(12 / 14)
  assert quant.skipped_columns(np.zeros((8, 1), np.int8), 8) == 1


@pytest.mark.parametrize("group", [0, 7, 64, "8"])
def test_unsupported_group_is_an_error(group):
  message = rf"group must be one of 8, 16, 32, got {group!r}"
  with pytest.raises(ValueError, match=message):
    quant.bitwave(group=group)
  with pytest.raises(ValueError, match=message):
    quant.skipped_columns(random_codes((8, 2)), 8, group=group)


def test_wrong_bits_and_codes_are_errors():
  with pytest.raises(ValueError, match="bits of bitwave must be integers from"):
    quant.bitwave((8, 1))
  with pytest.raises(ValueError, match=r"bits must be an integer in 2\.\.8"):
    quant.skipped_columns(random_codes((8, 2)), 1)
  with pytest.raises(
    ValueError, match=r"codes must be in -127..127, got -128..3"
  ):
    quant.skipped_columns(np.array([[-128], [3]], np.int8), 8)
  with pytest.raises(
    ValueError, match="codes must be integers, got dtype float32"
  ):
    quant.skipped_columns(np.ones((8, 1), np.float32), 8)
