"""What every method declares of its storage, against what it stores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import quant

CASES = {
  name: quant.get(name)
  for name in quant.NAMES
  if isinstance(quant.get(name), quant.WeightQuantizer)
} | {
  "adabits original": quant.adabits(scheme="original", rescale="stddev"),
  "adabits gain": quant.adabits(rescale=True),
  "matquant": quant.truncation(scheme="matquant"),
  "lsq single": quant.lsq((4,)),
  "half up": quant.double_rounding(rounding="half_up"),
  "half up of close bits": quant.double_rounding(
    (7, 6, 5, 2), rounding="half_up"
  ),
  "floor": quant.double_rounding((8, 5, 3, 2), rounding="floor"),
  "floor single": quant.double_rounding((8,), rounding="floor"),
  "adabits one bit": quant.adabits((8, 4, 1)),
  "unshared": quant.double_rounding(shared=False),
}
WEIGHTS = {
  "zero": jnp.zeros((3, 4)),
  "large": jnp.array([[1e15, -1e-30], [-1e15, 1.0]]),
  "depthwise": jax.random.normal(jax.random.key(0), (3, 3, 1, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_arrays_have_the_layout_and_the_ranges_that_are_declared(name):
  quantizer = CASES[name]
  for w in WEIGHTS.values():
    params = jax.tree.map(jnp.negative, quantizer.init(w))
    encoded = quantizer.encode(params, w)
    shapes = jax.eval_shape(lambda arrays: arrays, encoded)
    layout = quantizer.storage.layout(shapes)
    packed = quantizer.storage.pack(encoded)
    assert packed.keys() == layout.keys()
    for key, array in packed.items():
      shape = jax.eval_shape(lambda array: array, array)
      assert layout[key] == shape or (layout[key], array.ndim) == (None, 1)
    for key, smallest, largest in quantizer.storage.ranges:
      values = np.asarray(encoded.get(key, smallest))
      assert smallest <= values.min() and values.max() <= largest


NESTED = {"bit_mixer", "truncation", "adabits", "adabits gain"} | {
  name for name in CASES if name.startswith(("half up", "floor", "adabits one"))
} - {"floor single"}


@pytest.mark.parametrize("name", sorted(NESTED))
def test_the_planes_that_bits_need_decode_to_the_same_weight(name):
  quantizer = CASES[name]
  planes = quantizer.storage.planes
  assert len(planes) == len(quantizer.bits) > 1
  assert list(planes) == sorted(planes, reverse=True)
  w = WEIGHTS["depthwise"]
  encoded = quantizer.encode(quantizer.init(w), w)
  encoded["codes"] = jnp.arange(-128, 128, dtype=jnp.int8)[:, None]
  encoded["codes"] >>= 8 - quantizer.bits[0]
  for key in encoded.keys() - {"codes"}:
    encoded[key] = encoded[key] if key == "gain" else encoded[key][0, 0]
  packed = quantizer.storage.pack(encoded)
  assert len(packed["codes"]) == quantizer.bits[0]
  for index, count in enumerate(planes):
    part = packed | {"codes": packed["codes"][:count]}
    found = quantizer.storage.unpack(part, encoded["codes"].shape)
    for lower in range(index, len(planes)):
      np.testing.assert_array_equal(
        quantizer.decode(found, lower), quantizer.decode(encoded, lower)
      )


def test_methods_that_drop_bits_are_stored_as_planes_and_no_others():
  found = {name for name, q in CASES.items() if q.storage.planes}
  assert found == NESTED
  for name, planes in (
    ("half up", (8, 7, 5, 3)),
    ("half up of close bits", (7, 7, 6, 3)),
    ("floor", (8, 5, 3, 2)),
    ("adabits one bit", (8, 4, 1)),
  ):
    assert CASES[name].storage.planes == planes
