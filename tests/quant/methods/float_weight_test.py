"""Weights that stay float."""

import jax
import numpy as np

from dr_jax import quant


def test_weights_and_their_gradients_pass_unchanged():
  w = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  quantizer = quant.float_weight((8, 1))
  for index in range(2):
    out, pull = jax.vjp(lambda w, i=index: quantizer.fake_quantize({}, w, i), w)
    np.testing.assert_array_equal(out, w)
    np.testing.assert_array_equal(pull(w)[0], w)
    assert quantizer.storage.size(quantizer.encode({}, w), index) == w.nbytes
