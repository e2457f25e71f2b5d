"""Quantizers of single layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import deploy, nn, quant

BITS = (8, 4)
INPUTS = quant.lsq_activation(BITS)


class Three(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.stem = nnx.Linear(4, 6, rngs=rngs)
    self.body = nnx.List([nnx.Linear(6, 6, rngs=rngs)])
    self.head = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(self.body[0](self.stem(x)))


def images():
  return jax.random.normal(jax.random.key(0), (5, 4))


def quantize(rules, activation=INPUTS):
  return nn.quantize(
    Three(),
    weight=quant.double_rounding(BITS),
    activation=activation,
    sample=images(),
    rules=rules,
    skip=(),
  )


def test_a_rule_changes_the_layers_that_it_matches_and_later_ones_win():
  lsq, pact = quant.lsq(BITS), quant.lsq_plus_activation(BITS)
  network = quantize(
    [
      ("*", {"activation": None}),
      ("body/*", {"activation": pact, "weight": lsq}),
      ("stem", {"weight": lsq}),
    ]
  )
  layers = nn.quantized.quantized_layers(network)
  weights = [layer.weight_quantizer.name for layer in layers.values()]
  assert weights == ["lsq", "lsq", "double_rounding"]
  inputs = [layer.input_quantizer for layer in layers.values()]
  assert [q and q.name for q in inputs] == [None, pact.name, None]
  for bits in BITS:
    nn.set_bits(network, bits)
    assert jnp.isfinite(network(images())).all()


def test_layers_of_float_inputs_are_stored_beside_others(tmp_path):
  network = quantize([("head", {"activation": None})])
  assert [row.signed for row in nn.layer_table(network)] == [True, True, None]
  deploy.save(tmp_path / "model", network)
  loaded = deploy.load(tmp_path / "model", model=Three())
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.set_bits(loaded, bits)
    np.testing.assert_array_equal(loaded(images()), network(images()))


def test_an_artifact_has_one_method(tmp_path):
  network = quantize([("head", {"weight": quant.lsq(BITS)})])
  with pytest.raises(
    ValueError, match="weights of layers must have one method.*lsq.*of head"
  ):
    deploy.save(tmp_path / "model", network)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("rule", "message"),
  [
    (("tail", {"activation": None}), r"match layers of \['body/0'.*'tail'"),
    (("head", {"bits": 4}), r"rules must be pairs.*'bits'"),
    (("head",), "rules must be pairs"),
    ("head", "rules must be pairs"),
    ((3, {}), "rules must be pairs"),
    (("head", {"weight": None}), "weight of rule 'head' must be a quant"),
    (("head", {"weight": INPUTS}), "weight of rule 'head' must be a quant"),
    (("head", {"activation": 4}), "activation of rule 'head' must be a quant"),
    (
      ("head", {"weight": quant.lsq((8, 2))}),
      r"weight.bits of rule 'head' must be those of all layers, \(8, 4\)",
    ),
  ],
)
def test_a_rule_that_is_none_is_one_line(rule, message):
  with pytest.raises(ValueError, match=message):
    quantize([rule])
