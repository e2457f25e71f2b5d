"""Weights that stay float, and methods registered from outside."""

import jax
import numpy as np
import pytest

from dr_jax import quant


def test_weights_and_their_gradients_pass_unchanged():
  w = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  quantizer = quant.float_weight((8, 1))
  for index in range(2):
    out, pull = jax.vjp(lambda w, i=index: quantizer.fake_quantize({}, w, i), w)
    np.testing.assert_array_equal(out, w)
    np.testing.assert_array_equal(pull(w)[0], w)
    assert quantizer.storage.size(quantizer.encode({}, w), index) == w.nbytes


def test_a_registered_name_is_found_and_cannot_be_taken_twice():
  def mine(bits=(8, 4), *, option=1):
    return quant.lsq(bits)

  quant.register("mine_for_a_test", mine)
  quant.register("mine_for_a_test", mine)  # again: nothing new
  assert "mine_for_a_test" in quant.NAMES
  assert quant.get("mine_for_a_test", bits=(6,)).bits == (6,)
  with pytest.raises(ValueError, match="'mine_for_a_test': is taken"):
    quant.register("mine_for_a_test", quant.lsq)
  with pytest.raises(ValueError, match="'lsq': is taken"):
    quant.register("lsq", mine)
