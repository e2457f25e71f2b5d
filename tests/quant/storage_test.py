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
