"""Integer weights and rules exchanged with qwix; products by its kernels."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from stacked_network import LAYERS, Scanned

from dr_jax import allocate, nn, quant
from dr_jax.nn.quantized import quantized_layers

qwix = pytest.importorskip(
  "qwix", reason='needs qwix: pip install "dr_jax[qwix]"'
)
# It imports qwix.
from dr_jax.interop.qwix import (  # noqa: E402
  from_qarrays,
  qarrays_of,
  rules,
  to_qarrays,
)

BITS = (8, 6, 4, 2)


@contextlib.contextmanager
def as_qwix():
  """It multiplies integers by floats, and calls what Flax deprecates."""
  with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
    warnings.simplefilter("ignore", DeprecationWarning)
    yield


class Network(nnx.Module):
  """One layer of each kind that has a kernel."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(11, 6, rngs=rngs)
    self.conv = nnx.Conv(6, 8, (3, 3), feature_group_count=2, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      2, 8, decode=False, rngs=rngs, keep_rngs=False
    )
    self.einsum = nnx.Einsum("nti,oi->nto", (5, 8), rngs=rngs)
    self.layers = nnx.List([nnx.Linear(5, 7, rngs=rngs)])
    self.transposed = nnx.ConvTranspose(7, 4, (2,), rngs=rngs)

  def __call__(self, tokens):
    x = self.conv(self.embed(tokens))
    x = self.attention(x.reshape(len(x), -1, 8))
    return self.transposed(self.layers[0](self.einsum(x)))


TOKENS = jnp.arange(32, dtype=jnp.int32).reshape(2, 4, 4) % 11
SHAPES = {
  "embed": ((11, 6), (11, 1)),
  "conv": ((3, 3, 3, 8), (1, 1, 1, 8)),
  "attention/query": ((8, 2, 4), (1, 2, 4)),
  "attention/key": ((8, 2, 4), (1, 2, 4)),
  "attention/value": ((8, 2, 4), (1, 2, 4)),
  "attention/out": ((2, 4, 8), (1, 1, 8)),
  "einsum": ((5, 8), (5, 1)),
  "layers/0": ((5, 7), (1, 7)),
  "transposed": ((2, 7, 4), (1, 1, 4)),
}


@functools.cache
def network(name="double_rounding", seed=0, **options):
  return nn.quantize(
    Network(nnx.Rngs(seed)),
    weight=quant.get(name, **options),
    sample=TOKENS,
    skip=(),
  )


def linear(name):
  """One layer of 128 x 2 weights."""
  return nn.quantize(
    nnx.Linear(128, 2, rngs=nnx.Rngs(0)),
    weight=quant.get(name),
    sample=jnp.ones((1, 128)),
    skip=(),
  )


def kernels(network):
  """The kernels that the layers compute with, by name."""
  return {
    name: layer._quantize_kernel(
      layer.embedding[...] if name == "embed" else layer.kernel[...]
    )
    for name, layer in quantized_layers(network).items()
  }


def check_equal(got, wanted):
  assert list(got) == list(wanted)
  for name in wanted:
    for a, b in zip(
      jax.tree.leaves(got[name]), jax.tree.leaves(wanted[name]), strict=True
    ):
      np.testing.assert_array_equal(a, b, err_msg=name)


MIXED = dict(zip(SHAPES, [8, 6, 4, 2] * 3, strict=False))


@pytest.mark.parametrize(
  ("name", "integers"),
  [
    ("double_rounding", "int{}"),
    ("lsq", "int{}"),
    ("bit_mixer", "int{}"),
    ("adabits", "int{}"),
    # Its integers have eight bits, few of them set.
    ("bitwave", "int8"),
  ],
)
def test_dequantized_arrays_are_the_kernels_bit_for_bit(name, integers):
  model = nnx.clone(network(name))
  nn.set_bits(model, MIXED)
  arrays = to_qarrays(model)
  assert list(arrays) == list(SHAPES)
  for layer, kernel in kernels(model).items():
    array = arrays[layer]
    assert array.qtype == integers.format(MIXED[layer])
    narrow = array.qtype in ("int2", "int4")
    assert array.qvalue.dtype == (jnp.int4 if narrow else jnp.int8)
    shape, scale = SHAPES[layer]
    scale = (1,) * len(shape) if name == "adabits" else scale
    assert (array.shape, array.scale.shape) == (shape, scale)
    np.testing.assert_array_equal(qwix.dequantize(array), kernel)


def test_a_deployed_network_gives_the_arrays_of_the_trained_one():
  model = nnx.clone(network(rounding="half_up"))
  stored = nn.deployed.assemble(
    Network(nnx.Rngs(1)), nn.deployed.parts_of(model)
  )
  for each in (model, stored):
    nn.set_bits(each, MIXED)
  check_equal(to_qarrays(stored), to_qarrays(model))


@pytest.mark.parametrize(
  "name", ["double_rounding", "lsq", "lsq_plus", "bit_mixer"]
)
def test_arrays_come_back_from_another_network(name):
  arrays = to_qarrays(network(name))
  other = network(name, seed=1)
  check_equal(to_qarrays(from_qarrays(other, arrays)), arrays)
  # The other one is as it was.
  assert (to_qarrays(other)["conv"].qvalue != arrays["conv"].qvalue).any()


def test_arrays_of_all_256_integers_come_back():
  codes = np.random.default_rng(0).permutation(256) - 128
  model = linear("double_rounding")
  (name,) = to_qarrays(model)
  # Scales that are not powers of two, far apart.
  scale = jnp.array([[3e-7, 0.7e5]], jnp.float32)
  array = qwix.QArray(jnp.asarray(codes.reshape(128, 2), jnp.int8), scale)
  filled = from_qarrays(model, {name: array})
  (back,) = to_qarrays(filled).values()
  np.testing.assert_array_equal(back.qvalue, array.qvalue)
  np.testing.assert_array_equal(back.scale, array.scale)
  # Lower bit-widths are the second rounding of these.
  nn.set_bits(filled, 4)
  (low,) = to_qarrays(filled).values()
  np.testing.assert_array_equal(
    low.qvalue.astype(jnp.int8), quant.switch_codes(array.qvalue, 8, 4)
  )
  np.testing.assert_array_equal(low.scale, 16 * scale)


def test_arrays_of_a_stack_come_back_one_by_one():
  def scanned(seed):
    return nn.quantize(
      Scanned(seed=seed),
      weight=quant.double_rounding((8, 4)),
      sample=jnp.ones((2, 5)),
      skip=(),
    )

  arrays = to_qarrays(scanned(0))
  assert {f"blocks/a/{n}" for n in range(LAYERS)} < set(arrays)
  assert arrays["blocks/a/1"].shape == (6, 12)
  check_equal(to_qarrays(from_qarrays(scanned(1), arrays)), arrays)


@functools.cache
def quantized_by_qwix(bits=8):
  """A network, and the same one with weights and inputs quantized by qwix."""
  model = Network(nnx.Rngs(0))
  layers = [name for name in SHAPES if name != "embed"]
  allocation = allocate.Allocation.uniform(layers, bits)
  provider = qwix.PtqProvider(rules(allocation, inputs=allocation))
  with as_qwix():
    return model, qwix.quantize_model(model, provider, TOKENS)


def test_a_network_that_qwix_quantized_has_the_same_kernels_here():
  model, by_qwix = quantized_by_qwix()
  arrays = qarrays_of(by_qwix)
  assert set(arrays) == set(SHAPES) - {"embed"}
  weight = quant.double_rounding((8, 4))
  ours = nn.quantize(model, weight=weight, sample=TOKENS, skip="embed")
  filled = from_qarrays(ours, arrays)
  for name, kernel in kernels(filled).items():
    np.testing.assert_array_equal(kernel, qwix.dequantize(arrays[name]))


def test_qwix_quantizes_the_layers_of_an_allocation_with_its_bits():
  allocation = allocate.Allocation(
    {"conv": 8, "attention/query": 4, "einsum": 2, "layers/0": 6}
  )
  inputs = {"conv": 8, "einsum": 8}
  found = rules(allocation, inputs=inputs, weight_calibration_method="rms,3")
  assert {rule.weight_calibration_method for rule in found} == {"rms,3"}
  assert [rule.act_qtype for rule in found] == ["int8", None, "int8", None]
  provider = qwix.PtqProvider(found)
  with as_qwix():
    by_qwix = qwix.quantize_model(Network(nnx.Rngs(0)), provider, TOKENS)
  assert provider.get_unused_rules() == []
  arrays = qarrays_of(by_qwix)
  assert {name: array.qtype for name, array in arrays.items()} == {
    name: f"int{bits}" for name, bits in allocation.items()
  }
  for name, bits in allocation.items():
    codes = arrays[name].qvalue.astype(jnp.int32)
    assert 2 ** (bits - 2) <= abs(codes).max() <= 2 ** (bits - 1)


def test_a_rule_takes_its_path_letter_by_letter():
  (rule,) = rules({"a.b/c+": 4})
  assert rule.module_path == r"a\.b/c\+"


CONV = {
  "window_strides": (2, 2),
  "padding": "SAME",
  "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
}


def products():
  """Layers with the product that each is, of plain or quantized arrays."""
  rngs = nnx.Rngs(0)
  conv = nnx.Conv(6, 8, (3, 3), strides=2, use_bias=False, rngs=rngs)
  linear = nnx.Linear(6, 8, use_bias=False, rngs=rngs)
  contract = {"dimension_numbers": (((3,), (0,)), ((), ()))}
  return {
    "conv": (conv, "conv_general_dilated", CONV),
    "linear": (linear, "dot_general", contract),
  }


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_products_of_qwix_are_ours(kind, unsigned):
  layer, product, options = products()[kind]
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 6))
  x = abs(x) if unsigned else x
  model = nn.quantize(
    layer,
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=x,
    skip=(),
  )
  ((name, ours),) = quantized_layers(model).items()
  codes, scale = ours.integer_operands(x, ours.kernel[...])[0]
  zero = None
  if unsigned:  # qwix has signed integers with a zero point
    assert codes.dtype == jnp.uint8
    codes = (codes.astype(jnp.int16) - 128).astype(jnp.int8)
    zero = jnp.full((1, 1, 1, 1), -128, jnp.int8)
  weight = to_qarrays(model)[name]
  call = as_qwix()(functools.partial(getattr(qwix, product), **options))
  inputs = qwix.QArray(codes, jnp.ones((1, 1, 1, 1)), zero)
  # Scales of one leave the sums of integers, which floats hold exactly.
  sums = call(inputs, qwix.QArray(weight.qvalue, jnp.ones_like(weight.scale)))
  exact = getattr(lax, product)(
    codes.astype(jnp.float32) + 128.0 * unsigned,
    weight.qvalue.astype(jnp.float32),
    **options,
  )
  assert 2**24 > abs(exact).max() > 2**10
  np.testing.assert_array_equal(sums, exact)
  inputs = qwix.QArray(codes, scale.reshape(1, 1, 1, 1), zero)
  # float32: scales are multiplied after the sum, not before.
  expected = model(x)
  np.testing.assert_allclose(
    call(inputs, weight), expected, rtol=0, atol=1e-6 * abs(expected).max()
  )


class TwoLayers(nnx.Module):
  """A convolution and a product, both with inputs of either sign."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    self.head = nnx.Linear(8, 5, rngs=rngs)

  def __call__(self, x):
    return self.head(jnp.tanh(self.conv(x)).mean((1, 2)))


def test_a_network_of_qwix_with_our_integers_gives_our_outputs():
  x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
  model = TwoLayers(nnx.Rngs(0))
  network = nn.quantize(
    model,
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS, signed=True),
    sample=x,
    skip=(),
  )
  allocation = dict.fromkeys(("conv", "head"), 8)
  found = rules(allocation, inputs=allocation, act_static_scale=True)
  with as_qwix():
    by_qwix = qwix.quantize_model(model, qwix.PtqProvider(found), x)
  arrays = to_qarrays(network)
  for name, op in (("conv", "conv_general_dilated"), ("head", "dot_general")):
    layer, theirs = quantized_layers(network)[name], getattr(by_qwix, name)
    # Powers of two: qwix divides by a scale where we multiply by 1 / scale.
    scale = layer.input_params["scale"]
    scale[...] = 2.0 ** jnp.floor(jnp.log2(scale[...]))
    theirs.kernel = theirs.kernel.replace(array=arrays[name])
    static = getattr(theirs, f"{op}0_lhs_scale")
    shape = static.array.shape
    setattr(
      theirs,
      f"{op}0_lhs_scale",
      static.replace(array=scale[...][0].reshape(shape)),
    )
  expected = network(x)
  with as_qwix():
    outputs = by_qwix(x)
  np.testing.assert_allclose(
    outputs, expected, rtol=0, atol=1e-6 * abs(expected).max()
  )
  assert abs(model(x) - expected).max() > 1e-4 * abs(expected).max()


def bad_arrays():
  """(what is changed of one array, the message) by a name."""
  array = to_qarrays(network())["conv"]
  each = "float32 scale of each channel, (1, 1, 1, 8), or of all"
  return {
    "shape": (array.transpose(0, 1, 3, 2), "shape of the kernel, (3, 3, 3, 8)"),
    "floats": (
      qwix.QArray(array.qvalue.astype(jnp.float32), array.scale),
      "signed integers in the shape of the kernel, (3, 3, 3, 8), got float32",
    ),
    "nf4": (
      qwix.quantize(jnp.ones((3, 3, 3, 8)), "nf4"),
      "must be signed integers",
    ),
    "zero point": (
      qwix.QArray(array.qvalue, array.scale, jnp.int8(1)),
      "must have no zero point",
    ),
    "bfloat16": (
      array.astype(jnp.bfloat16),
      f"{each}, got bfloat16 (1, 1, 1, 8)",
    ),
    "blocks": (
      qwix.QArray(array.qvalue, jnp.ones((1, 1, 3, 8))),
      f"{each}, got float32 (1, 1, 3, 8)",
    ),
    "no array": (array.qvalue, "must be a qwix.QArray, got"),
    "scale": (
      qwix.QArray(array.qvalue, array.scale.at[0, 0, 0, 0].set(1e-20)),
      "double_rounding has at 8 bits; ",
    ),
  }


@pytest.mark.parametrize(
  "flaw",
  [
    "shape",
    "floats",
    "nf4",
    "zero point",
    "bfloat16",
    "blocks",
    "no array",
    "scale",
  ],
)
def test_arrays_that_no_layer_can_hold_are_named(flaw):
  array, message = bad_arrays()[flaw]
  arrays = to_qarrays(network()) | {"conv": array}
  with pytest.raises(ValueError) as caught:
    from_qarrays(network(), arrays)
  text = str(caught.value)
  assert text.startswith("qarrays['conv'] must") and message in text
  assert "\n" not in text


def test_an_integer_that_a_method_does_not_have_is_an_error():
  model = linear("bit_mixer")
  ((name, array),) = to_qarrays(model).items()
  array = qwix.QArray(array.qvalue.at[0].set(-128), array.scale)
  with pytest.raises(ValueError, match=r"bit_mixer has .*; 2 of 256 integers"):
    from_qarrays(model, {name: array})


def test_methods_and_networks_without_integers_are_errors():
  model = linear("term_quantization")
  with pytest.raises(ValueError, match="must have weights that are integers"):
    to_qarrays(model)
  with pytest.raises(ValueError, match="fit int8; those of any_precision at 8"):
    to_qarrays(linear("any_precision"))
  with pytest.raises(ValueError, match="must have a quantized layer"):
    to_qarrays(Network(nnx.Rngs(0)))
  model = linear("adabits")
  with pytest.raises(ValueError, match="method that learns a scale, got adab"):
    from_qarrays(model, to_qarrays(model))


def test_layers_that_do_not_match_are_named():
  arrays = to_qarrays(network())
  arrays["other"] = arrays.pop("conv")
  with pytest.raises(
    ValueError, match=r"unknown layers \['other'\], missing layers \['conv'\]"
  ):
    from_qarrays(network(), arrays)
  stored = nn.deployed.assemble(
    Network(nnx.Rngs(1)), nn.deployed.parts_of(network())
  )
  with pytest.raises(
    ValueError, match="what nn.quantize returned; embed holds"
  ):
    from_qarrays(stored, to_qarrays(network()))


def test_rules_of_unknown_bits_or_layers_are_errors():
  with pytest.raises(
    ValueError, match=r"allocation\['a'\] must be in 2..8, got 1"
  ):
    rules({"a": 1})
  with pytest.raises(
    ValueError, match=r"inputs\['a'\] must be in 2..8, got 16"
  ):
    rules({"a": 8}, inputs={"a": 16})
  with pytest.raises(ValueError, match=r"of the layers \['a'\], got \['b'\]"):
    rules({"a": 8}, inputs={"b": 8})
