"""Products with planes against exact ones, as XLA programs and as kernels.

Inputs and codes are small integers and scales powers of two, so that every sum
is exact in float32, in any order. Kernels run in Pallas' interpreter, which
takes seconds for each: `kernel_test` runs what a GPU would.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant
from dr_jax.quant.planes import kernel, measure, product

RULES = ("half_up", "floor")
EVERY = [(bits, rule) for bits in range(8, 1, -1) for rule in RULES]
SHAPES = {  # k and n do not divide blocks of 1024 codes by 32 columns
  "one row": (1, 70, 45),
  "rows": (16, 70, 45),
}


@functools.cache
def codes_of(k, n, bits=8):
  rng = np.random.default_rng(k + n)
  low, high = quant.code_range(bits)
  codes = rng.integers(low, high, (k, n), endpoint=True).astype(np.int8)
  codes.flat[-2:] = [low, high][-codes.size :]
  return codes


def inputs(m, k, dtype="float32"):
  x = np.random.default_rng(m * k).integers(-4, 5, (m, k))
  return jnp.asarray(x, dtype)


def exact(x, codes, bits, rounding, stored_bits=8):
  levels = quant.switch_codes(codes, stored_bits, bits, rounding=rounding)
  x = np.asarray(x.astype(jnp.float32)).astype(np.int64)
  return x @ np.asarray(levels).astype(np.int64)


@pytest.fixture
def interpreted(monkeypatch):
  """Lets backend="pallas" run on this device."""
  sums = functools.partial(kernel.plane_sums, interpret=True)
  monkeypatch.setitem(product._SUMS, "pallas", sums)


def check(backend, shape, bits, rounding, dtype):
  m, k, n = shape
  x, codes = inputs(m, k, dtype), codes_of(k, n)
  planes = quant.to_planes(codes, 8)
  scale = 2.0 ** jnp.arange(-3, n - 3, dtype=jnp.float32)[None]

  @jax.jit
  def run(x, planes):
    return quant.matmul(
      x, planes, scale, bits, rounding=rounding, backend=backend
    )

  y = run(x, planes)
  expected = exact(x, codes, bits, rounding) * 2.0 ** (8 - bits)
  expected = jnp.asarray(expected * np.asarray(scale), jnp.float32)
  assert y.dtype == x.dtype
  np.testing.assert_array_equal(y, expected.astype(dtype))


@pytest.mark.parametrize(
  ("shape", "bits", "rounding"),
  [
    *(("one row", *options) for options in EVERY),
    *((shape, 3, "half_up") for shape in SHAPES if shape != "one row"),
  ],
)
def test_xla_products_are_exact(shape, bits, rounding):
  check("xla", SHAPES[shape], bits, rounding, "float32")


@pytest.mark.parametrize("bits, rounding", [(8, "floor"), (3, "half_up")])
def test_kernels_of_one_row_are_exact(bits, rounding, interpreted):
  check("pallas", SHAPES["one row"], bits, rounding, "float32")


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_bfloat16_are_exact(shape, interpreted):
  backend = "xla" if shape == "one row" else "pallas"
  check(backend, SHAPES[shape], 4, "half_up", "bfloat16")


# Each bit-width with each shape and type, by one rule: the other one has the
# other types. So each rule has all of them, too.
@pytest.mark.slow
@pytest.mark.parametrize("bits, rounding", EVERY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_every_product_is_exact(backend, shape, bits, rounding, interpreted):
  numbers = bits, RULES.index(rounding), [*SHAPES].index(shape)
  dtype = ("float32", "bfloat16")[sum(numbers) % 2]
  check(backend, SHAPES[shape], bits, rounding, dtype)


@pytest.mark.parametrize("shape", [(1, 2100, 33), (1, 1024, 32), (1, 1, 1)])
def test_kernels_are_exact_over_several_blocks(shape, interpreted):
  check("pallas", shape, 4, "half_up", "float32")


@pytest.mark.slow
def test_kernels_are_exact_over_several_blocks_of_every_axis(interpreted):
  check("pallas", (20, 1060, 40), 4, "half_up", "float32")


@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_planes_below_those_needed_are_never_read(backend, interpreted):
  codes = codes_of(70, 45)
  planes = quant.to_planes(codes, 8)
  x, scale = inputs(1, 70), jnp.ones((1, 1))
  run = jax.jit(
    functools.partial(
      quant.matmul, bits=3, rounding="half_up", stored_bits=8, backend=backend
    )
  )
  expected = exact(x, codes, 3, "half_up") * 2.0**5
  garbage = planes.at[4:].set(~planes[4:])
  for stored in (planes, garbage, planes[:4]):
    np.testing.assert_array_equal(run(x, stored, scale), expected)
  changed = planes.at[3].set(~planes[3])
  assert (run(x, changed, scale) != expected).any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_one_bit_width_are_planes_of_their_own(bits):
  codes = codes_of(40, 6, bits)
  planes = quant.to_planes(codes, bits)
  assert planes.nbytes == bits * 2 * 4 * 6  # two words for 40 codes
  x = inputs(1, 40)
  y = quant.matmul(x, planes, jnp.float32(1), bits, rounding="floor")
  np.testing.assert_array_equal(y, exact(x, codes, bits, "floor", bits))


@pytest.mark.parametrize("backend, m", [("xla", 1), ("xla", 16), ("pallas", 1)])
def test_random_floats_differ_by_the_order_of_sums_alone(
  backend, m, interpreted
):
  k, n, bits = 300, 40, 4
  w = jax.random.normal(jax.random.key(0), (k, n))
  method = quant.double_rounding((8, bits), rounding="half_up")
  stored = method.encode(method.init(w), w)
  decoded = np.asarray(method.decode(stored, 1)).astype(np.float64)
  planes = quant.to_planes(stored["codes"], 8)
  x = jax.random.normal(jax.random.key(m), (m, k))
  y = jax.jit(
    functools.partial(
      quant.matmul, bits=bits, rounding="half_up", backend=backend
    )
  )(x, planes, stored["scale"])
  x = np.asarray(x).astype(np.float64)
  # Each of k products and sums rounds by at most half an ulp of a partial sum,
  # which |x| @ |w| bounds.
  bound = (k + 2) * 2.0**-24 * (abs(x) @ abs(decoded))
  assert (abs(np.asarray(y) - x @ decoded) <= bound).all()


def test_leading_axes_of_inputs_are_kept():
  codes = codes_of(40, 6)
  planes = quant.to_planes(codes, 8)
  x = inputs(6, 40)
  options = {"bits": 5, "rounding": "floor"}
  run = functools.partial(
    quant.matmul, planes=planes, scale=jnp.ones((1, 6)), **options
  )
  y = run(x)
  np.testing.assert_array_equal(run(x.reshape(2, 3, 40)), y.reshape(2, 3, 6))
  np.testing.assert_array_equal(run(x[0]), y[0])


def test_importing_quant_does_not_import_pallas():
  code = "import sys, dr_jax.quant; print(*sys.modules)"
  modules = subprocess.run(
    [sys.executable, "-c", code], check=True, capture_output=True, text=True
  ).stdout.split()
  assert "dr_jax.quant.planes.product" in modules
  assert not {m for m in modules if m.startswith("jax.experimental.pallas")}


def test_auto_is_xla_where_there_is_no_gpu_and_nothing_is_measured(monkeypatch):
  monkeypatch.setattr(measure, "fastest", None)
  check("auto", SHAPES["one row"], 4, "half_up", "float32")


def test_auto_measures_once_for_each_shape_bit_width_and_kind(monkeypatch):
  measured = []

  def fastest(programs):
    measured.append(sorted(programs))
    for program in programs.values():
      program()
    return "xla"

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(measure, "fastest", fastest)
  monkeypatch.setattr(product, "_REPEATS", 2)
  monkeypatch.setitem(product._SUMS, "pallas", product._xla_sums)
  product._measured.cache_clear()
  for _ in range(2):  # also while it is traced
    check("auto", (1, 40, 9), 4, "half_up", "float32")
  assert measured == [["pallas", "xla"]]
  check("auto", (1, 40, 9), 2, "half_up", "float32")
  check("auto", (2, 40, 9), 2, "half_up", "float32")
  assert len(measured) == 3
  product._measured.cache_clear()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"backend": "cuda"}, "backend must be one of 'auto', 'xla', 'pallas'"),
    ({"x": jnp.ones((1, 40), jnp.int8)}, "x must be float32 or bfloat16"),
    ({"x": jnp.ones((1, 70))}, r"planes must be uint32 \[1..8, 3, n\]"),
    ({"scale": jnp.ones((1, 5))}, r"scale must have 1 or 6 entries, got shape"),
    ({"bits": 9}, "bits must be an integer in 2..8"),
    ({"rounding": "half_even"}, "rounding must be one of"),
    ({"stored_bits": 8, "planes": jnp.zeros((4, 2, 6), jnp.uint32)}, "least 5"),
  ],
)
def test_what_cannot_be_multiplied_is_one_clear_line(change, message):
  arguments = {
    "x": jnp.ones((1, 40)),
    "planes": jnp.zeros((8, 2, 6), jnp.uint32),
    "scale": jnp.ones((1, 6)),
    "bits": 4,
    "rounding": "half_up",
  }
  with pytest.raises(ValueError, match=message) as raised:
    quant.matmul(**(arguments | change))
  assert "\n" not in str(raised.value)
