"""The laws of the interface, for every registered method.

Equal "bit for bit" ignores the sign of a zero, which integer codes do not have.
"""

import functools
import itertools
import json
from collections.abc import Callable
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as arrays_of
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dr_jax import quant
from tests.support.drift import drift

# Every method once with its defaults, and the options that change its code.
# Four bit-widths each, so that operations of eager calls are compiled once.
VARIANTS = {
  "double_rounding": [
    {"rounding": "half_up", "bits": (7, 5, 3, 2)},
    {"rounding": "floor", "per_channel": False},
    {"shared": False},
  ],
  "bit_mixer": [{"per_channel": False, "bits": (7, 5, 3, 2)}],
  "bitwave": [{"per_channel": False, "bits": (7, 5, 3, 2), "group": 16}],
  "binary": [{"per_channel": False}],
  "ternary": [{"per_channel": False}],
  "lsq": [{"per_channel": False}, {"bits": (4,)}],
  "lsq_activation": [{"signed": False}],
  "lsq_plus": [{"per_channel": False}, {"bits": (4,)}],
  "truncation": [
    {"bits": (7, 5, 3, 2), "per_channel": False},
    {"scheme": "matquant"},
    {"scheme": "matquant", "extra_precision": True, "per_channel": False},
  ],
  "term_quantization": [
    {"group": 5, "weight_bits": 5},
    {"bits": (4,), "budgets": (4,), "group": 3},
  ],
  "term_activation": [{"data_bits": 4, "signed": False}],
  "multi_resolution": [{"group": 4, "magnitude_bits": 8}],
  "multi_resolution_activation": [{"signed": False}],
  "adabits": [
    {"scheme": "centered", "rescale": True, "bits": (7, 5, 3, 1)},
    {"rescale": "stddev"},
    {"scheme": "original"},
    {"scheme": "original", "rescale": True},
  ],
  "pact_activation": [
    {"scheme": "modified", "signed": False},
    {"scheme": "centered", "initial": None, "bits": (8, 5, 2, 1)},
  ],
  "unit_activation": [{"signed": False, "bits": (8, 5, 3, 1)}],
  "dynamic_activation": [{"signed": False, "bits": (8, 5, 3, 2)}],
}
# Scales of these are found by calibration; no gradient moves them.
CALIBRATED = ("term_activation",)
# Sums of terms, values with an offset, and floats.
WITHOUT_INTEGERS = (
  "float_weight",
  "lsq_plus_activation",
  "multi_resolution",
  "multi_resolution_activation",
  "term_activation",
  "term_quantization",
  "truncation",
)


class Case(NamedTuple):
  """A method and its options."""

  name: str
  options: tuple = ()


CASES = [
  Case(name, tuple(options.items()))
  for name in quant.NAMES
  for options in [{}, *VARIANTS.get(name, [])]
]


class Fitted(NamedTuple):
  """A quantizer with parameters under which some weights clip.

  Its compiled programs take weights [3, 3, 4, 8] and a traced index; tests
  share them, since compiling is most of the time.
  """

  quantizer: quant.WeightQuantizer | quant.ActivationQuantizer
  params: dict
  w: np.ndarray
  fake_quantize: Callable  # (params, w, index)
  gradients: Callable  # of sum(g * w_hat): (params, w, index, g)
  encode: Callable | None  # (params, w)


@functools.cache
def build(case, **options):
  """The quantizer; open signs are decided."""
  quantizer = quant.get(case.name, **{**dict(case.options), **options})
  undecided = getattr(quantizer, "signed", True) is None
  return quantizer.with_sign(True) if undecided else quantizer


@functools.cache
def fitted(case):
  quantizer, w = build(case), kernel()
  w.flags.writeable = False
  weight = is_weight(case)
  return Fitted(
    quantizer,
    jax.tree.map(lambda p: p / 2, quantizer.init(w)),
    w,
    jax.jit(quantizer.fake_quantize),
    jax.jit(jax.grad(loss_of(quantizer), (0, 1))),
    jax.jit(quantizer.encode) if weight else None,
  )


def is_weight(case):
  return isinstance(build(case), quant.WeightQuantizer)


def learns_a_scale(case):
  w = jax.ShapeDtypeStruct((4, 8), jnp.float32)
  has_scale = "scale" in jax.eval_shape(build(case).init, w)
  return has_scale and case.name not in CALIBRATED


def label(case):
  return "-".join([case.name, *(str(value) for _, value in case.options)])


def each(cases):
  """Methods with their defaults; other options in the slow run."""
  slow = pytest.mark.slow
  marked = [pytest.param(c, marks=slow) if c.options else c for c in cases]
  return pytest.mark.parametrize("case", marked, ids=label)


every_method = each(CASES)
SCALED = list(filter(learns_a_scale, CASES))
every_scaled = each(SCALED)
every_weight = each(filter(is_weight, CASES))


def kernel(shape=(3, 3, 4, 8), seed=0):
  w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  w[0, ..., 0] *= 10  # beyond the clip range
  return w


def loss_of(quantizer):
  def loss(params, w, index, g):
    return (g * quantizer.fake_quantize(params, w, index)).sum()

  return loss


def assert_close(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
    found,
    expected,
  )


@every_method
def test_bits_and_options_rebuild_the_quantizer_through_json(case):
  quantizer, params, w, *_ = fitted(case)
  options = json.loads(json.dumps(dict(quantizer.options)))
  again = quant.get(quantizer.name, **options)
  assert quantizer.name == case.name
  assert again.bits == quantizer.bits
  assert again.options == quantizer.options
  assert hash(again.options) == hash(quantizer.options)
  last = len(quantizer.bits) - 1
  np.testing.assert_array_equal(
    again.fake_quantize(params, w, last),
    quantizer.fake_quantize(params, w, last),
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@every_method
def test_shape_and_dtype_are_those_of_the_input(case, dtype):
  quantizer = build(case)
  w = jax.ShapeDtypeStruct((3, 3, 4, 8), dtype)
  params = jax.eval_shape(quantizer.init, w)
  assert all(p.dtype == jnp.float32 for p in params.values())
  index = jax.ShapeDtypeStruct((), jnp.int32)
  out = jax.eval_shape(quantizer.fake_quantize, params, w, index)
  assert (out.shape, out.dtype) == (w.shape, dtype)


@every_method
def test_int_traced_constant_and_vmapped_calls_give_the_same_bits(case):
  quantizer, params, w, traced, *_ = fitted(case)
  w = w.copy()
  # Multiples of half a scale put weights on the ties of the first rounding.
  if "scale" in params:
    first = np.asarray(params["scale"].reshape(-1)[0])
    w[1, 1] = np.arange(-16, 16).reshape(4, 8) / 2 * first
  indices = range(len(quantizer.bits))
  constant = jax.jit(lambda w, i: quantizer.fake_quantize(params, w, i))
  unrolled = jax.jit(
    lambda w: [quantizer.fake_quantize(params, w, i) for i in indices]
  )
  folded = unrolled(w)
  vmapped = jax.vmap(quantizer.fake_quantize, (None, None, 0))
  stacked = jax.jit(vmapped)(params, w, jnp.arange(len(indices)))
  stacked_eagerly = vmapped(params, w, jnp.arange(len(indices)))
  for i in indices:
    expected = quantizer.fake_quantize(params, w, i)
    for name, found in {
      "eager, array index": quantizer.fake_quantize(params, w, jnp.int32(i)),
      "numpy index": quantizer.fake_quantize(params, w, np.int64(i)),
      "jit, index traced": traced(params, w, jnp.int32(i)),
      "jit, scale constant": constant(w, jnp.int32(i)),
      "jit, index and scale constant": folded[i],
      "vmap under jit": stacked[i],
      "vmap": stacked_eagerly[i],
    }.items():
      np.testing.assert_array_equal(found, expected, err_msg=name)


@every_method
def test_gradients_agree_between_int_traced_and_vmapped_index(case):
  quantizer, params, w, _, traced, _ = fitted(case)
  g = np.sin(kernel(seed=1))
  gradient = jax.grad(loss_of(quantizer), (0, 1))
  ends = {0, len(quantizer.bits) - 1}  # without and with a second rounding
  unrolled = jax.jit(
    lambda *args: {i: gradient(*args[:2], i, args[2]) for i in ends}
  )(params, w, g)
  stacked = jax.jit(jax.vmap(gradient, (None, None, 0, None)))(
    params, w, jnp.arange(len(quantizer.bits)), g
  )
  for i, expected in unrolled.items():
    for found in (
      traced(params, w, jnp.int32(i), g),
      jax.tree.map(lambda x, i=i: x[i], stacked),
    ):
      np.testing.assert_array_equal(found[1], expected[1])
      # The factor and the sum of 288 terms may each round differently.
      assert_close(found[0], expected[0])


@pytest.mark.parametrize("value", [0, 3e38])
@every_method
def test_no_gradient_is_nan_for_huge_and_zero_inputs(case, value):
  quantizer, _, w, _, gradients, _ = fitted(case)
  w = np.full_like(w, value)
  params = quantizer.init(w)
  found = gradients(params, w, jnp.int32(0), np.sin(w))
  for leaf in jax.tree.leaves((params, found)):
    assert np.isfinite(leaf).all()


# Strategies: any finite float32 (XLA flushes denormals), any positive scale.
FLOATS = st.floats(
  allow_nan=False, allow_infinity=False, allow_subnormal=False, width=32
)
NEAR = st.integers(-1200, 1200).map(lambda n: n / 8)
SCALES = st.floats(2.0**-40, 2.0**40, width=32)
BITS = [
  bits for n in (1, 2, 3) for bits in itertools.combinations(range(8, 1, -1), n)
]


@st.composite
def weights_and_scales(draw):
  """[6, 2] weights, some near codes of their scales, and those [1, 2]."""
  scale = draw(arrays_of.arrays(np.float32, (1, 2), elements=SCALES))
  w = draw(arrays_of.arrays(np.float32, (6, 2), elements=FLOATS))
  codes = draw(arrays_of.arrays(np.float32, (6, 2), elements=NEAR))
  near = draw(arrays_of.arrays(np.bool_, (6, 2)))
  return np.where(near, codes * scale, w).astype(np.float32), scale


def with_bits(case, bits, rounding):
  """The quantizer with drawn bit-widths, where it has several."""
  options = {"bits": bits} if len(build(case).bits) > 1 else {}
  if case.name == "double_rounding":
    options["rounding"] = rounding
  return build(case, **options)


@every_weight
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  drawn=weights_and_scales(),
  bits=st.sampled_from(BITS),
  rounding=st.sampled_from(quant.ROUNDINGS),
  dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_decoded_is_fake_quantized_bit_for_bit(
  case, drawn, bits, rounding, dtype
):
  w, scale = drawn
  w = jnp.clip(jnp.asarray(w), -3e38, 3e38).astype(dtype)
  quantizer = with_bits(case, bits, rounding)
  bits = quantizer.bits
  params = quantizer.init(w)
  params = {
    k: jnp.broadcast_to(scale[:, : p.shape[-1]], p.shape) if k == "scale" else p
    for k, p in params.items()
  }
  encoded = quantizer.encode(params, w)
  for i in range(len(bits)):
    decoded = quantizer.decode(encoded, i)
    assert decoded.dtype == jnp.float32
    np.testing.assert_array_equal(
      decoded.astype(dtype), quantizer.fake_quantize(params, w, i)
    )
    assert np.isfinite(decoded).all()


@every_method
def test_integers_times_their_scale_are_what_is_decoded(case):
  quantizer, params, w, *_ = fitted(case)
  if quantizer.integers is None:
    assert case.name in WITHOUT_INTEGERS
    return
  encoded = quantizer.encode(params, w) if is_weight(case) else None
  for index in range(len(quantizer.bits)):
    if is_weight(case):
      codes, scale = quantizer.integers(encoded, index)
      expected = quantizer.decode(encoded, index)
    else:
      codes, scale = quantizer.integers(params, w, index)
      expected = quantizer.fake_quantize(params, w, index)
    assert jnp.issubdtype(codes.dtype, jnp.integer) and codes.shape == w.shape
    # A column of bits is one of each group of BitWave, not of the weight.
    levels = 2 ** quantizer.bits[0 if case.name == "bitwave" else index]
    assert len(np.unique(codes)) <= levels
    # One rounding of the scale, one of the product.
    np.testing.assert_allclose(
      codes.astype(np.float32) * scale, expected, rtol=2**-22, atol=0
    )


@pytest.mark.parametrize("name", ["double_rounding", "lsq_activation"])
def test_integers_are_the_same_for_a_traced_index(name):
  quantizer, params, w, *_ = fitted(Case(name))
  if isinstance(quantizer, quant.WeightQuantizer):
    encoded = quantizer.encode(params, w)
    integers = functools.partial(quantizer.integers, encoded)
  else:
    integers = functools.partial(quantizer.integers, params, w)
  traced = jax.jit(integers)
  for index in range(4):
    jax.tree.map(
      np.testing.assert_array_equal, traced(jnp.int32(index)), integers(index)
    )


@every_weight
def test_decode_gives_the_same_bits_for_every_kind_of_index(case):
  quantizer, params, w, *_, encode = fitted(case)
  encoded = encode(params, w)
  jax.tree.map(
    np.testing.assert_array_equal, encoded, quantizer.encode(params, w)
  )
  indices = jnp.arange(len(quantizer.bits))
  decode = jax.jit(jax.vmap(quantizer.decode, (None, 0)))
  stacked = decode(encoded, indices)
  for i in range(len(quantizer.bits)):
    expected = quantizer.fake_quantize(params, w, i)
    np.testing.assert_array_equal(quantizer.decode(encoded, i), expected)
    np.testing.assert_array_equal(stacked[i], expected)


@every_weight
def test_bfloat16_params_decode_to_what_they_fake_quantize(case):
  quantizer, params, w, *_ = fitted(case)
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  encoded = quantizer.encode(params, w)
  for i in range(len(quantizer.bits)):
    np.testing.assert_array_equal(
      quantizer.decode(encoded, i), quantizer.fake_quantize(params, w, i)
    )


@every_weight
def test_packing_round_trips_and_takes_the_stored_bits(case):
  quantizer, params, w, *_, encode = fitted(case)
  # The kernel clips on both sides, so that both ends are in use.
  encoded = encode(params, 100 * w)
  packed = quantizer.storage.pack(encoded)
  assert all(isinstance(array, np.ndarray) for array in packed.values())
  back = quantizer.storage.unpack(packed, w.shape)
  assert set(back) == set(encoded)
  for name, value in encoded.items():
    assert back[name].dtype == value.dtype
    np.testing.assert_array_equal(back[name], value)
  sizes = [
    quantizer.storage.size(encoded, i) for i in range(len(quantizer.bits))
  ]
  assert sizes == sorted(sizes, reverse=True)
  main = {n: a for n, a in packed.items() if n in ("codes", "weight")}
  if main:
    bits = 8 * sum(array.nbytes for array in main.values()) / w.size
    assert bits == quantizer.stored_bits
  assert (quantizer.stored_bits == 32) == ("weight" in encoded)


def mesh_of(devices, kind):
  return jax.make_mesh(
    (devices,),
    ("x",),
    axis_types=(kind,),
    devices=jax.devices()[:devices],
  )


OUTPUT_CHANNELS, INPUT_CHANNELS = P(None, None, None, "x"), P(None, None, "x")


# One mesh of each kind for every method and its options. The others say the
# same, and compile as long: for methods with their defaults, in the slow run.
# So do meshes whose axes XLA assigns by itself.
MESHES = (
  (2, AxisType.Auto, INPUT_CHANNELS),
  (4, AxisType.Explicit, OUTPUT_CHANNELS),
)
MORE_MESHES = (
  (4, AxisType.Auto, OUTPUT_CHANNELS),
  (2, AxisType.Explicit, OUTPUT_CHANNELS),
  (4, AxisType.Explicit, INPUT_CHANNELS),
)


@pytest.mark.parametrize(
  ("case", "devices", "kind", "spec"),
  [
    pytest.param(
      case,
      *mesh,
      marks=[pytest.mark.slow] * bool(case.options or mesh != MESHES[1]),
      id=f"{label(case)}-{number}",
    )
    for case in CASES
    for number, mesh in enumerate(MESHES + MORE_MESHES * (not case.options))
  ],
)
def test_meshes_change_neither_values_nor_gradients(case, devices, kind, spec):
  quantizer, params, w, fake_quantize, gradients, _ = fitted(case)
  g = np.sin(kernel(seed=1))

  def everything(params, w, g, index):
    fake = functools.partial(quantizer.fake_quantize, index=index)
    out, pull = jax.vjp(fake, params, w)
    decoded = out
    if is_weight(case):
      decoded = quantizer.decode(quantizer.encode(params, w), index)
    return out, decoded, pull(g)

  run = jax.jit(everything)
  index = jnp.int32(len(quantizer.bits) - 1)
  expected = fake_quantize(params, w, index)
  expected_dparams, expected_dw = gradients(params, w, index, g)
  mesh = mesh_of(devices, kind)
  with jax.set_mesh(mesh):
    for placement in placements(params, spec):
      place = functools.partial(placed, mesh)
      placed_params = {k: place(p, placement(p)) for k, p in params.items()}
      found = run(placed_params, place(w, spec), place(g, spec), index)
      out, decoded, (dparams, dw) = found
      np.testing.assert_array_equal(out, expected)
      np.testing.assert_array_equal(decoded, expected)
      np.testing.assert_array_equal(dw, expected_dw)
      assert_close(dparams, expected_dparams)
      assert dw.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
      if kind == AxisType.Explicit:
        for k, p in placed_params.items():
          assert jax.typeof(dparams[k]) == jax.typeof(p)


def placed(mesh, x, spec):
  return jax.device_put(x, NamedSharding(mesh, spec))


def placements(params, spec):
  """Where parameters live: everywhere; also with the channels of the weight."""
  yield lambda p: P()
  if spec == OUTPUT_CHANNELS and any(p.shape[-1] == 8 for p in params.values()):
    yield lambda p: P(*[None] * (p.ndim - 1), "x") if p.shape[-1] == 8 else P()


@every_method
def test_init_works_on_a_sharded_explicit_weight(case):
  w = kernel()
  quantizer = build(case)
  expected = quantizer.init(w)
  mesh = mesh_of(4, AxisType.Explicit)
  with jax.set_mesh(mesh):
    for spec in (OUTPUT_CHANNELS, INPUT_CHANNELS):
      params = quantizer.init(jax.device_put(w, NamedSharding(mesh, spec)))
      assert_close(params, expected)


@every_method
def test_shard_map_sums_the_scale_gradient_over_the_shards(case):
  """A replicated scale gets the sum of the shards' own gradients."""
  w, g = kernel((8, 6)), np.sin(kernel((8, 6), seed=1))
  quantizer = build(case)
  params = jax.tree.map(lambda p: p / 2, quantizer.init(w))
  mesh = mesh_of(4, AxisType.Auto)

  def step(params, w, g, index):
    out, pull = jax.vjp(
      lambda p, w: quantizer.fake_quantize(p, w, index), params, w
    )
    return out, *pull(g)

  sharded = jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(P(), P("x"), P("x"), P()),
      out_specs=(P("x"), P(), P("x")),
    )
  )
  index = jnp.int32(len(quantizer.bits) - 1)
  out, dparams, dw = sharded(params, w, g, index)
  alone = jax.jit(step)
  shards = [
    alone(params, w[i : i + 2], g[i : i + 2], index) for i in range(0, 8, 2)
  ]
  np.testing.assert_array_equal(out, np.concatenate([s[0] for s in shards]))
  np.testing.assert_array_equal(dw, np.concatenate([s[2] for s in shards]))
  assert_close(
    dparams, jax.tree.map(lambda *a: sum(a), *[s[1] for s in shards])
  )


@pytest.mark.slow
@every_method
def test_shard_map_runs_one_bit_width_per_device(case):
  quantizer, params, w, fake_quantize, gradients, _ = fitted(case)
  n = 2 if len(quantizer.bits) > 1 else 1
  gradient = jax.grad(loss_of(quantizer), (0, 1))
  g = np.sin(kernel(seed=1))

  def step(params, w, indices):
    found = gradient(params, w, indices[0], g)
    return quantizer.fake_quantize(params, w, indices[0])[None], found

  outs, summed = jax.jit(
    jax.shard_map(
      step,
      mesh=mesh_of(n, AxisType.Auto),
      in_specs=(P(), P(), P("x")),
      out_specs=(P("x"), P()),
    )
  )(params, w, jnp.arange(n))
  for i in range(n):
    np.testing.assert_array_equal(
      outs[i], fake_quantize(params, w, jnp.int32(i))
    )
  alone = [gradients(params, w, jnp.int32(i), g) for i in range(n)]
  assert_close(summed, jax.tree.map(lambda *a: sum(a), *alone))


@pytest.mark.parametrize(
  ("optimizer", "rate"),
  [
    pytest.param("sgd", 10.0, marks=pytest.mark.slow),
    ("adam", 0.05),
  ],
)
# The scale of one is not driven below zero by any learning rate here.
@each(case for case in SCALED if case.name != "multi_resolution_activation")
def test_learning_rates_100_times_too_large_keep_everything_finite(
  case, optimizer, rate
):
  w = kernel((16, 8)) / 10
  quantizer = build(case)

  def loss(variables, index):
    params, x = variables
    out = quantizer.fake_quantize(params, x, index)
    return ((out - w) ** 2).sum(), out

  variables, finite, lowest = drift(
    loss,
    (quantizer.init(w), jnp.asarray(w)),
    optimizer,
    rate,
    candidates=len(quantizer.bits),
    watch=lambda variables: variables[0]["scale"].min(),
  )
  assert finite.all()
  # The raw parameter did go below zero: the clamp had something to do.
  assert lowest.min() < 0
  if is_weight(case):
    scale = quantizer.encode(*variables)["scale"]
    assert ((scale > 0) & np.isfinite(scale)).all()


@pytest.mark.parametrize("raw", [-3.0, 0.0, -0.0, 1e-38, 1e38])
@every_scaled
def test_any_finite_scale_is_read_as_a_positive_one(case, raw):
  _, params, w, fake_quantize, gradients, _ = fitted(case)
  clamped = float(np.clip(raw, quant.SCALE_MIN, quant.SCALE_MAX))

  def with_scale(value):
    return {**params, "scale": jnp.full_like(params["scale"], value)}

  index = jnp.int32(0)
  np.testing.assert_array_equal(
    fake_quantize(with_scale(raw), w, index),
    fake_quantize(with_scale(clamped), w, index),
  )
  gradient = gradients(with_scale(raw), w, index, np.sin(w))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@every_method
def test_a_jitted_function_may_close_over_the_weight(case):
  quantizer, params, w, *_ = fitted(case)
  expected = quantizer.fake_quantize(params, w, 0)

  def closing(params):
    return [
      quantizer.fake_quantize(params, closed_over, jnp.int32(0))
      for closed_over in (w, jnp.asarray(w))
    ]

  for found in jax.jit(closing)(params):
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_weight
def test_nan_and_infinite_weights_are_an_error_outside_jit(case, bad):
  quantizer, params, w, fake_quantize, *_ = fitted(case)
  w = w.copy()
  w[1, 2, 3, 4] = bad
  for call in (
    lambda: quantizer.init(w),
    lambda: quantizer.fake_quantize(params, w, 0),
    lambda: quantizer.encode(params, w),
  ):
    with pytest.raises(
      ValueError, match="weight must be finite, but 1 of 288 values"
    ):
      call()
  fake_quantize(params, w, jnp.int32(0))


@every_method
def test_a_python_index_out_of_range_is_an_error(case):
  quantizer, params, w, *_, encode = fitted(case)
  n = len(quantizer.bits)
  for index in (n, -1):
    message = rf"index must be in 0\.\.{n - 1}, .*got {index}$"
    with pytest.raises(ValueError, match=message):
      quantizer.fake_quantize(params, w, index)
    if is_weight(case):
      with pytest.raises(ValueError, match=message):
        quantizer.decode(encode(params, w), index)


@pytest.mark.parametrize("name", quant.NAMES)
def test_wrong_bits_are_an_error_that_names_them(name):
  with pytest.raises(ValueError, match=r"bits.*must be.*got \(9, 4\)"):
    quant.get(name, bits=(9, 4))
